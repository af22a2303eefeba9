"""Rows are shared out without losing one, in an order that the seed and the epoch decide."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from swift_gkd_plugin.sources import DATASET, Draw
from swift_gkd_plugin.step.cycle import Cycle
from swift_gkd_plugin.step.data import Row, RowBatchSampler, StreamOfRows, row_loader, share_out
from swift_gkd_plugin.step.ranks import Ranks

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


# With --gkd_num_samples n a row has r = 1 (it drew the dataset) or r = n responses. The order of a pass p over the data is that of r = 1,
# each row r times in its place; the order of a run is that of pass 0, of pass 1, … The trainers' epoch e is [e L, (e + 1) L) of it, with
# L = ceil((R_0 + … + R_{E-1}) / E) for E epochs and R_p responses in pass p. Hence E L - E < R_0 + … + R_{E-1} <= E L.
DRAWS = st.builds(Draw, st.integers(0, 9), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans(), st.integers(1, 8))
BATCHES = st.sampled_from([(1, 1), (3, 1), (2, 2), (1, 8)])


def order_of_passes(draw, num_rows, passes):
    once = RowBatchSampler(num_rows, 1, seed=4)
    for epoch in range(passes):
        once.set_epoch(epoch)
        for [(_, number, _, _)] in once:
            times = draw.num_samples if draw.source(epoch, number) != DATASET else 1
            yield from ((epoch, number, repeat) for repeat in range(times))


def all_ranks(batch_size, world_size, **how):
    return [RowBatchSampler(batch_size=batch_size, seed=4, rank=rank, world_size=world_size, **how) for rank in range(world_size)]


def in_order(ranks, epoch, batch_size):
    """The micro-batches of an epoch, each as the (epoch, number, repeat) that count on any rank."""
    for rank in ranks:
        rank.set_epoch(epoch)
    for batches in zip(*ranks, strict=True):
        keys = [keys[place] for place in range(batch_size) for keys in batches if place < len(keys)]
        yield [(epoch, number, repeat) for epoch, number, counts, repeat in keys if counts]


@settings(deadline=None)
@given(DRAWS, st.integers(1, 40), st.integers(1, 4), BATCHES)
def test_every_response_of_every_epoch_once(draw, num_rows, epochs, batch):
    ranks = all_ranks(*batch, num_rows=num_rows, draw=draw, epochs=epochs)
    windows = [list(in_order(ranks, epoch, batch[0])) for epoch in range(epochs)]
    assert {len(window) for window in windows} == {len(ranks[0])}  # transformers and Megatron count on it
    expected = list(order_of_passes(draw, num_rows, epochs))
    found = [key for window in windows for keys in window for key in keys]
    assert found[: len(expected)] == expected and len(found) < len(expected) + epochs
    assert all(epoch >= epochs for epoch, _, _ in found[len(expected) :])  # of one row several passes
    full = batch[0] * batch[1]
    assert all(len(keys) == full for window in windows for keys in window[:-1]) and all(window[-1] for window in windows)


@settings(deadline=None)
@given(DRAWS, st.integers(1, 40), st.integers(1, 3))
def test_a_step_holds_the_same_responses_on_any_number_of_ranks(draw, num_rows, epochs):
    found = []
    for batch_size, accumulation, world_size in [(2, 4, 1), (1, 4, 2), (1, 1, 8)]:
        ranks = all_ranks(batch_size, world_size, num_rows=num_rows, draw=draw, epochs=epochs)
        found.append([])
        for epoch in range(epochs):
            batches = list(in_order(ranks, epoch, batch_size))
            steps = range(0, len(batches), accumulation)
            found[-1] += [list(itertools.chain(*batches[step : step + accumulation])) for step in steps]
    assert found[0] == found[1] == found[2]


@settings(deadline=None)
@given(DRAWS, BATCHES, st.integers(0, 3), st.integers(0, 4))
def test_skipping_continues_with_the_same_responses(draw, batch, epoch, skip):
    how = {'num_rows': 23, 'draw': draw, 'epochs': 3}
    for whole, rest in zip(all_ranks(*batch, **how), all_ranks(*batch, skip=skip, **how), strict=True):
        whole.set_epoch(epoch)
        rest.set_epoch(epoch)
        assert list(rest) == list(whole)[skip:] and len(rest) == len(list(rest))


def drawn(source_per, n=8, num_rows=2000):
    """The samples of all micro-batches of two epochs on 8 ranks, half of the rows the dataset's."""
    args = SimpleNamespace(
        seed=3, lmbda=0.5, seq_kd=False, gkd_num_samples=n, gkd_source_per=source_per, reward_funcs=[], reward_model=None
    )
    cycle = Cycle(args, ROWS, SimpleNamespace(check=lambda sample: None), {}, Ranks(torch.device('cpu')))
    ranks = all_ranks(1, 8, num_rows=num_rows, draw=cycle.draw, epochs=2)
    rows = [[Row(number, epoch, {}, counts, repeat)] for rank in ranks for [(epoch, number, counts, repeat)] in rank]
    return [samples for place, one in enumerate(rows) for samples in cycle.drawn([one], (0, place % len(ranks[0])))]


def test_a_response_of_the_dataset_leaves_no_fillers():
    samples = [sample for [sample] in drawn('sample')]
    assert sum(not sample.row.counts for sample in samples) < 0.01 * len(samples)
    once = [(sample.row.epoch, sample.row.number) for sample in samples if sample.source == DATASET and sample.row.counts]
    assert len(set(once)) == len(once) > 900


def test_with_a_coin_for_each_cycle_repeats_are_dropped_when_it_falls():
    samples = [sample for [sample] in drawn('batch')]
    assert len(samples) == 2000 * 8
    assert all(sample.row.repeat == 0 for sample in samples if sample.source == DATASET and sample.row.counts)
    assert 0.4 < sum(not sample.row.counts for sample in samples) / len(samples) < 0.48


def test_stream_is_numbered_starts_again_and_loses_nothing():
    stream = StreamOfRows(Stream(ROWS), 4)
    seen = [pair for batch in numbers(stream, 12) for pair in batch]
    assert seen == [(epoch, n) for epoch in (0, 1) for n in range(23)]


@settings(deadline=None)
@given(DRAWS, st.integers(1, 5))
def test_a_row_of_a_stream_comes_as_often_as_it_has_responses(draw, batch_size):
    seen = list(itertools.islice(itertools.chain.from_iterable(StreamOfRows(Stream(ROWS), batch_size, draw=draw)), 300))
    times = [draw.repeats(*pair) for pair in itertools.product(range(20), range(23))]
    pairs = itertools.product(range(20), range(23))
    expected = [(number, epoch, repeat) for (epoch, number), n in zip(pairs, times, strict=True) for repeat in range(n)]
    assert all(row.counts for row in seen) and [row.key for row in seen] == expected[:300]


def test_resumed_stream_continues():
    whole, rest = StreamOfRows(Stream(ROWS), 4), StreamOfRows(Stream(ROWS), 4, skip=7)
    assert numbers(rest, 5) == numbers(whole, 12)[7:]


def test_stream_for_evaluation_ends():
    assert [n for batch in numbers(StreamOfRows(Stream(ROWS), 4, endless=False)) for _, n in batch] == list(range(23))


def test_empty_stream_says_so():
    with pytest.raises(ValueError, match='no row'):
        next(iter(StreamOfRows(Stream([]), 2)))
