"""Which response each sample learns from, and the random numbers that belong to it.

Everything here is a pure function of the run's seed, the epoch and the row's number in the loaded dataset (its position in a
stream). So every rank draws the same, on any number of ranks and after a resume, and nothing has to be stored or broadcast.

The draw is the one of GKD (Agarwal et al., 2024, arXiv 2306.13649), taken for each sample:
``u = uniform(seed, epoch, row)``; the student answers if ``u < lmbda``, else the teacher if ``seq_kd``, else the dataset does.
"""

from __future__ import annotations

import hashlib
from typing import Literal

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
    """Number of the row whose content stands in for one that can't be encoded: attempt 0, 1, … until one fits."""
    return _bits('replace', seed, epoch, row, attempt) % num_rows
