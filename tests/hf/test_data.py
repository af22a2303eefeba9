"""Rows are shared out without losing one, in an order that the seed and the epoch decide."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from swift_gkd_plugin.step.data import RowBatchSampler, StreamOfRows, row_loader, share_out

ROWS = [{'messages': [{'role': 'user', 'content': str(i)}]} for i in range(23)]


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_row_once(num_rows, batch_size, world_size):
    shares = [share_out(list(range(num_rows)), batch_size, world_size, rank) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # all ranks run the same number of micro-batches
    counted = [n for share in shares for batch in share for n, counts in batch if counts]
    assert sorted(counted) == list(range(num_rows))
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)


@given(st.sampled_from([(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]))
def test_a_step_holds_the_same_rows_however_it_is_split(layout):
    batch_size, accumulation, world_size = layout
    order = list(range(22))
    shares = [share_out(order, batch_size, world_size, rank) for rank in range(world_size)]
    for step in range(6):
        rows = {n for share in shares for batch in share[step * accumulation : (step + 1) * accumulation] for n, counts in batch if counts}
        assert rows == set(order[4 * step : 4 * step + 4])


def numbers(loader, batches=None):
    return [[(row.epoch, row.number) for row in batch] for _, batch in zip(range(batches or 10**9), loader, strict=False)]


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 4))
def test_skipping_continues_the_same_epoch(epoch, skip):
    whole = RowBatchSampler(23, 3, seed=1)
    rest = RowBatchSampler(23, 3, seed=1, skip=skip)
    whole.set_epoch(epoch)
    rest.set_epoch(epoch)
    assert list(rest) == list(whole)[skip:] and len(rest) == len(list(rest))


def test_epochs_are_shuffled_differently_and_none_is_when_told_so():
    loader = row_loader(ROWS, 4, seed=1, drop_last=False, rank=0, world_size=1)
    first = numbers(loader)
    loader.set_epoch(1)
    assert sorted(n for b in numbers(loader) for _, n in b) == list(range(23)) and first != numbers(loader)
    plain = row_loader(ROWS, 4, seed=None, drop_last=True, rank=0, world_size=1)
    assert [n for b in numbers(plain) for _, n in b] == list(range(20)) and len(plain) == 5


def test_stream_is_numbered_starts_again_and_loses_nothing():
    stream = StreamOfRows(Stream(ROWS), 4)
    seen = [pair for batch in numbers(stream, 12) for pair in batch]
    assert seen == [(epoch, n) for epoch in (0, 1) for n in range(23)]


def test_resumed_stream_continues():
    whole, rest = StreamOfRows(Stream(ROWS), 4), StreamOfRows(Stream(ROWS), 4, skip=7)
    assert numbers(rest, 5) == numbers(whole, 12)[7:]


def test_stream_for_evaluation_ends():
    assert [n for batch in numbers(StreamOfRows(Stream(ROWS), 4, endless=False)) for _, n in batch] == list(range(23))


def test_empty_stream_says_so():
    with pytest.raises(ValueError, match='no row'):
        next(iter(StreamOfRows(Stream([]), 2)))
