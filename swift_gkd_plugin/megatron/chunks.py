"""The virtual stages of a rank: each of them is a chunk of the model, and reads the same micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')


def for_each_chunk(batches: Iterable[T], chunks: int) -> list[Iterator[T]]:
    """An iterator for each chunk. A micro-batch is made when the first of them reads it and kept until the last one has; itertools.tee
    keeps blocks of 57."""
    source, made = iter(batches), 0
    kept: dict[int, tuple[T, int]] = {}  # with the number of chunks that have not read it

    def take(number: int) -> T:
        batch, readers = kept.pop(number)
        if readers > 1:
            kept[number] = batch, readers - 1
        return batch

    def of_one() -> Iterator[T]:
        nonlocal made
        number = 0
        while True:
            if number == made:
                try:
                    kept[number] = next(source), chunks
                except StopIteration:
                    return
                made += 1
            yield take(number)
            number += 1

    return [of_one() for _ in range(chunks)]
