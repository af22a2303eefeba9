"""Whether a run fits its card, and what would make it fit: found by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from swift.utils import get_logger

from ..arguments import OptionError
from ..world import this_rank
from .sizes import apart
from .table import Table, gib

logger = get_logger()
Setup = TypeVar('Setup')
SHOWN = 3  # so many single changes are named, if there are


@dataclass(frozen=True)
class Card:
    """The device of a rank and its bytes."""

    name: str
    bytes: int

    @classmethod
    def of_this_rank(cls) -> Card | None:
        """None without a CUDA device: host memory is not compared."""
        if not torch.cuda.is_available():
            return None
        number = torch.cuda.current_device()
        return cls(f'cuda:{number}', torch.cuda.get_device_properties(number).total_memory)


def foretell(
    setup_of: Callable[[], Setup], table: Callable[[Setup], Table], changes: Callable[[Setup], Mapping[str, Callable[[Setup], Setup]]]
) -> Setup | None:
    """Print what each rank will hold, and compare it with this rank's card.

    Args:
        setup_of: What a run is made of, by its options.
        table: What the fullest rank holds of it.
        changes: Options that make it smaller, in the words of the command line, and what becomes of the setup.

    Returns:
        What the run is made of; None if the models cannot be counted.

    Raises:
        OptionError: What is exact in the table alone is more than the card has.
    """
    try:
        with apart():
            setup = setup_of()
            table(setup)
    except Exception as error:  # of a model's own code, which was never meant to be built without memory; no reason to end a run
        if this_rank() == 0:
            logger.warning(f'Memory is not foretold, for the models cannot be counted: {type(error).__name__}: {error}')
        return None
    announce(setup, table, changes(setup), setup.card)
    return setup


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        table: What the fullest rank holds.
        peak: Its largest phase, in a line.
        too_much: What to say if the card cannot hold what is exact in the table; None if it can.
        perhaps: The same, if it can hold that and not what is estimated besides.
    """

    table: Table
    peak: str
    too_much: str | None = None
    perhaps: str | None = None


def judged(setup: Setup, table: Callable[[Setup], Table], changes: Mapping[str, Callable[[Setup], Setup]], card: Card | None) -> Verdict:
    """Compare what each rank will hold with the card; the arguments are those of :func:`announce`."""
    found = table(setup)
    peak = f"Peak: {gib(found.peak())} in '{found.fullest()}'" + (f'; {card.name} has {gib(card.bytes)}.' if card else '.')
    if card is None or found.peak() <= card.bytes:
        return Verdict(found, peak)
    advice, sure = what_fits(setup, table, changes, card.bytes), found.peak(exact_only=True)
    if sure > card.bytes:
        return Verdict(
            found,
            peak,
            too_much=f"Memory: in its phase '{found.fullest(True)}' a rank holds {gib(sure)} at least ({found.largest(True)}), and "
            f'{card.name} has {gib(card.bytes)}; {advice}.',
        )
    phase = found.fullest()
    return Verdict(
        found,
        peak,
        perhaps=f"Memory: in its phase '{phase}' a rank holds about {gib(found.peak())} ({found.largest()}), "
        f'{gib(found.held(phase, exact_only=True))} of it for certain, and {card.name} has {gib(card.bytes)}; should it run out of '
        f'memory: {advice}.',
    )


def announce(setup: Setup, table: Callable[[Setup], Table], changes: Mapping[str, Callable[[Setup], Setup]], card: Card | None) -> None:
    """Print what each rank will hold, and compare it with the card.

    Args:
        setup: What a run is made of.
        table: What a rank holds of it.
        changes: Options that make it smaller, in the words of the command line, and what becomes of the setup.
        card: None if no single card is filled.

    Raises:
        OptionError: What is exact in the table alone is more than the card has.
    """
    verdict = judged(setup, table, changes, card)
    if this_rank() == 0:
        logger.info(f'Memory that the fullest rank will hold, by what a step does:\n{verdict.table}\n{verdict.peak}')
    if verdict.too_much is not None:
        raise OptionError(verdict.too_much)
    if verdict.perhaps is not None and this_rank() == 0:
        logger.warning(verdict.perhaps)


def what_fits(setup: Setup, table: Callable[[Setup], Table], changes: Mapping[str, Callable[[Setup], Setup]], room: int) -> str:
    """Single options with which the estimated peak fits; if there are none, those that do together, the most effective first; if they do
    not either, how near they come."""
    single = {words: table(change(setup)).peak() for words, change in changes.items()}
    enough = [f'{words} ({gib(peak)})' for words, peak in single.items() if peak <= room]
    if enough:
        return f'it fits with {" or ".join(enough[:SHOWN])}'
    taken, peak, left = [], table(setup).peak(), dict(changes)
    while left and peak > room:
        tried = {words: table(change(setup)).peak() for words, change in left.items()}
        best = min(tried, key=tried.__getitem__)
        if tried[best] >= peak:
            break
        setup, peak = left.pop(best)(setup), tried[best]
        taken.append(best)
    if peak <= room:
        return f'it fits with {" and ".join(taken)} ({gib(peak)})'
    nearest = f' ({" and ".join(taken)} come nearest: {gib(peak)})' if taken else ''
    return f'more or larger cards are needed, a smaller model, or a teacher elsewhere (--teacher_model_server){nearest}'
