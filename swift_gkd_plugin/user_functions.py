"""Functions that users write, reward functions and feedback: what they take by name, and what is said when they fail."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable


class RewardError(RuntimeError):
    """A reward function or a feedback has failed, or returned what is none.

    Attributes:
        place: Of the response that it is about, among those that it was asked about; None for all of them.
    """

    def __init__(self, message: str, place: int | None = None):
        super().__init__(message)
        self.place = place


def failed(what: str, error: Exception, place: int | None = None) -> RewardError:
    """The error of a function as one line, with the line of the file that has raised it."""
    if isinstance(error, RewardError):
        return error
    where = traceback.extract_tb(error.__traceback__)[-1]
    return RewardError(f'{what} failed: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})', place)


def missing(function: Callable, known: Iterable[str]) -> list[str]:
    """What it cannot do without and is not given. What it is about comes first, without a name."""
    known = set(known)
    return [
        parameter.name
        for parameter in _named(function)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in known
    ]


def takes_anything(function: Callable) -> bool:
    """Whether it has **kwargs for what it does not name."""
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in _named(function))


def _named(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]
