"""What the rewards of a response tell the teacher that looks at it: a prompt of its own, with what the student has not seen.

A model that is shown what became of its response, and how others have answered, knows better than it did which tokens were wrong. Asked
about them once more, it is a teacher of itself (Self-Distillation Policy Optimization, arXiv 2601.20802).

``feedbacks`` has a function, or a class that is made once with ms-swift's arguments, for each name of ``--gkd_feedback``; a file of
``--external_plugins`` adds its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .arguments import OptionError
from .user_functions import RewardError, failed, missing, takes_anything


@dataclass(frozen=True)
class ScoredResponse:
    """A response of the student, and what it is worth.

    Attributes:
        text: Of a response of several turns, the last one.
        rewards: By the name of the reward function, as it is logged; None where that has no opinion.
        total: Their weighted sum.
        passed: Whether that is ``--gkd_passing_reward`` or more.
        question: What the teacher is asked unless there is a feedback: the column ``teacher_prompt``, or the last question of the row.
        siblings: The other responses to the same prompt, in their order; they have none themselves.
    """

    text: str
    rewards: dict[str, float | None]
    total: float
    passed: bool
    question: str
    siblings: tuple[ScoredResponse, ...] = field(default=(), repr=False)

    @property
    def best(self) -> ScoredResponse | None:
        """The sibling with the highest total, the first of several; None without siblings."""
        return max(self.siblings, key=lambda one: one.total, default=None)


def grouped(responses: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The responses to a prompt, each with the others as its siblings."""
    return [replace(one, siblings=(*responses[:place], *responses[place + 1 :])) for place, one in enumerate(responses)]


def sibling(response: ScoredResponse, /, **columns: Any) -> str | None:
    """The question, and the best other response to it as an example, if it has passed."""
    best = response.best
    if best is None or not best.passed:
        return None
    return (
        f'{response.question}\n\nA solution that was found to be right:\n\n{best.text}\n\n'
        'Solve the problem yourself now, in your own words, from the beginning.'
    )


feedbacks: dict[str, type | Callable[..., Any]] = {'sibling': sibling}


class Feedback:
    """``--gkd_feedback``.

    Args:
        args: ms-swift's arguments; ``--external_plugins`` are loaded.

    Attributes:
        label: For messages.

    Raises:
        OptionError: There is none of this name, or it cannot be made or called.
    """

    def __init__(self, args: Any):
        name = args.gkd_feedback
        self.label = f'--gkd_feedback {name}'
        if name not in feedbacks:
            raise OptionError(
                f'{self.label}: no such feedback; there are {", ".join(sorted(feedbacks))}, and what a file of --external_plugins puts '
                'into swift_gkd_plugin.feedback.feedbacks.'
            )
        found = feedbacks[name]
        try:
            self.function = found(args) if isinstance(found, type) else found
        except Exception as error:
            raise OptionError(f'{self.label}: {type(error).__name__}: {error}') from error
        if not callable(self.function):
            raise OptionError(f'{self.label}: it must be a function, or a class with a method __call__.')
        if not takes_anything(self.function):
            raise OptionError(f'{self.label}: it takes no **kwargs, and is given more than it names; add it.')

    def missing_columns(self, columns: Sequence[str]) -> list[str]:
        """Columns that it has no value for without the dataset's."""
        return missing(self.function, ('messages', *columns))

    def of(self, responses: Sequence[ScoredResponse], rows: Sequence[dict[str, Any]]) -> list[str | None]:
        """What the teacher is asked in place of the last question about each response; None where nothing is changed.

        Args:
            rows: The columns of each response's row, with ``messages``, the prompt.

        Raises:
            RewardError: It raised, or returned something else.
        """
        cases = list(enumerate(zip(responses, rows, strict=True)))
        if any(map(asyncio.iscoroutinefunction, (self.function, type(self.function).__call__))):

            async def together() -> list[str | None]:
                return await asyncio.gather(*(self._awaited(place, *case) for place, case in cases))

            return asyncio.run(together())
        return [self._one(place, *case) for place, case in cases]

    def _one(self, place: int, response: ScoredResponse, row: dict[str, Any]) -> str | None:
        try:
            return self._checked(self.function(response, **row), place)
        except Exception as error:
            raise failed(self.label, error, place) from error

    async def _awaited(self, place: int, response: ScoredResponse, row: dict[str, Any]) -> str | None:
        try:
            return self._checked(await self.function(response, **row), place)
        except Exception as error:
            raise failed(self.label, error, place) from error

    def _checked(self, found: Any, place: int) -> str | None:
        if found is not None and not (isinstance(found, str) and found):
            raise RewardError(f'{self.label} returned {found!r}; it must be a text, or None for no feedback', place)
        return found
