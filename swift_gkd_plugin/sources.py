"""Which response each sample learns from, and the random numbers that belong to it.

Everything here is a pure function of the run's seed, the epoch and the row's number in the loaded dataset (its position in a
stream). So every rank draws the same, on any number of ranks and after a resume, and nothing has to be stored or broadcast.

The draw is the one of GKD (Agarwal et al., 2024, arXiv 2306.13649), taken for each sample:
``u = uniform(seed, epoch, row)``; the student answers if ``u < lmbda``, else the teacher if ``seq_kd``, else the dataset does.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal['student', 'teacher', 'dataset']

STUDENT: Source = 'student'
TEACHER: Source = 'teacher'
DATASET: Source = 'dataset'
ALL_SOURCES: tuple[Source, ...] = (STUDENT, TEACHER, DATASET)


def _bits(purpose: str, *numbers: int) -> int:
    """53 random bits, a function of the purpose and the numbers alone."""
    text = ' '.join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 11


def uniform(seed: int, epoch: int, row: int, purpose: str = 'source') -> float:
    """A number in [0, 1) that belongs to this row in this epoch."""
    return _bits(purpose, seed, epoch, row) / (1 << 53)


def draw_source(u: float, lmbda: float, seq_kd: bool) -> Source:
    """The source that the number ``u`` in [0, 1) selects. ``lmbda`` = 0 never selects the student, 1 always does."""
    if u < lmbda:
        return STUDENT
    return TEACHER if seq_kd else DATASET


@dataclass(frozen=True)
class Draw:
    """The draws of a run, and what follows from them: how often each row comes.

    Args:
        seed: The run's ``--seed``.
        lmbda: Share of the student's responses.
        seq_kd: The teacher answers the rest, not the dataset.
        num_samples: Responses of the student or the teacher to a row (``--gkd_num_samples``); the dataset has one.
        per_sample: Each row draws. Otherwise each generation batch does, and only its cycle knows what (``--gkd_source_per batch``).
        whole_groups: Every row comes ``num_samples`` times, so that no generation batch has a part of a row's responses, for rewards
            compare them with each other, or a feedback looks at all of them. What repeats a response of the dataset is dropped by its
            cycle.
    """

    seed: int = 0
    lmbda: float = 1.0
    seq_kd: bool = False
    num_samples: int = 1
    per_sample: bool = True
    whole_groups: bool = False

    @classmethod
    def of(cls, args: Any) -> Draw:
        """The draws that the options of a run ask for."""
        per_sample, rewarded = args.gkd_source_per == 'sample', bool(args.reward_funcs or args.reward_model)
        together = rewarded and (args.gkd_rl_weight > 0 or args.gkd_feedback is not None)
        return cls(args.seed, args.lmbda, args.seq_kd, args.gkd_num_samples, per_sample, together)

    def source(self, *numbers: int, purpose: str = 'source') -> Source:
        """The source that these numbers draw: (epoch, row), or those of a generation batch with a purpose of its own."""
        return draw_source(uniform(self.seed, *numbers, purpose=purpose), self.lmbda, self.seq_kd)

    @functools.cached_property
    def always(self) -> int | None:
        """How often every row comes; None if that depends on what it draws."""
        if self.lmbda <= 0 and not self.seq_kd:
            return 1
        own_number = self.num_samples > 1 and self.per_sample and self.lmbda < 1 and not self.seq_kd and not self.whole_groups
        return None if own_number else self.num_samples

    def repeats(self, epoch: int, row: int) -> int:
        """How often a row comes in an epoch: as often as it has responses."""
        return self.always or (1 if self.source(epoch, row) == DATASET else self.num_samples)

    def epoch_length(self, num_rows: int, epochs: float = 1) -> int:
        """Responses of what the trainers count as one epoch, which has to be the same number in each: the mean, rounded up.

        Args:
            num_rows: Length of the dataset.
            epochs: Epochs that the run is meant to last.
        """
        epochs = 1 if self.always else max(math.ceil(epochs), 1)
        return -(-sum(_responses(self, epoch, num_rows) for epoch in range(epochs)) // epochs)

    def window(self, num_rows: int, start: int, length: int) -> Iterator[tuple[int, slice]]:
        """Where a part of the responses of all epochs, one epoch after the other, lies.

        Returns:
            (epoch, the part of its responses), in order.
        """
        for epoch in itertools.count():
            there = _responses(self, epoch, num_rows)
            if start < there or not length:
                yield epoch, slice(start, min(start + length, there))
                length -= there - start
                if length <= 0:
                    return
            start = max(start - there, 0)


@functools.cache
def _responses(draw: Draw, epoch: int, num_rows: int) -> int:
    """Responses of all rows in an epoch."""
    if draw.always:
        return draw.always * num_rows
    return sum(draw.repeats(epoch, row) for row in range(num_rows))


def sampling_seed(seed: int, epoch: int, row: int, source: Source, repeat: int = 0) -> int:
    """Seed of the tokens that are sampled for this row, so that a response does not depend on the batch it was sampled in.

    Args:
        repeat: Which of several responses to the row.
    """
    return _bits(f'sample {source}', seed, epoch, row, *([repeat] if repeat else []))


def engine_seed(seed: int, cycle: tuple[int, int], turn: int, engine: int) -> int:
    """Seed of the requests of one generation call, to which an engine adds the number of a request; in [0, 2^31).

    Args:
        cycle: (optimizer step, number of the generation cycle in it).
        turn: Of a conversation with a multi-turn scheduler.
        engine: Which of several engines is asked.
    """
    step, number = cycle
    return sampling_seed(seed, step, 1000 * (1000 * turn + number) + engine, STUDENT) % 2**31


def replacement_row(seed: int, epoch: int, row: int, attempt: int, num_rows: int) -> int:
    """Number of the row, another one, whose content stands in for one that can't be encoded: attempt 0, 1, … until one fits."""
    number = _bits('replace', seed, epoch, row, attempt) % num_rows
    return number if number != row else (row + 1 + _bits('replace, not by itself', seed, epoch, row, attempt) % (num_rows - 1)) % num_rows


def drew_itself(seed: int, epoch: int, row: int, attempt: int, num_rows: int) -> bool:
    """Whether :func:`replacement_row` gave the row itself, as it could once; checkpoints of that time remember the attempt."""
    return _bits('replace', seed, epoch, row, attempt) % num_rows == row
