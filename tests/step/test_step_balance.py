"""Rows of a step in micro-batches of about the same size, over all owners; what that means for a run is in test_step_ranks.py."""

from __future__ import annotations

import itertools
import random

import pytest

from swift_gkd_plugin.step.balance import Balancing, Told, arranged, size_of, spread


def lengths_of(count: int, seed: int = 0) -> list[int]:
    """As answers have them: many short ones, a few that reach the limit."""
    draw = random.Random(seed)
    return [min(int(draw.expovariate(1 / 300)) + 20, 2048) for _ in range(count)]


def in_turn(lengths: list[int], owners: int, count: int) -> list[list[list[Told]]]:
    """As rows come: consecutive ones to the owners in turn."""
    of_owner = [lengths[owner::owners] for owner in range(owners)]
    return [[list(map(Told, of[n :: len(of) // (len(of) // count)][: len(of) // count])) for n in range(count)] for of in of_owner]


def sizes(told, found, packed: bool) -> list[list[int]]:
    rows = [list(itertools.chain.from_iterable(batches)) for batches in told]
    return [[size_of([rows[o][n].tokens for o, n in batch], packed) for batch in batches] for batches in found]


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize(('rows', 'count'), [(1, 1), (7, 3), (3, 5), (64, 8), (0, 2)])
def test_every_row_is_in_one_group(rows, count, packed):
    lengths = lengths_of(rows)
    groups = spread(lengths, count, packed)
    assert len(groups) == count and sorted(itertools.chain.from_iterable(groups)) == list(range(rows))
    assert sum(map(bool, groups)) == min(rows, count)
    largest = max(size_of([lengths[place] for place in group], packed) for group in groups)
    in_order = [size_of(lengths[n::count], packed) for n in range(count)]
    assert largest <= max(in_order)


def test_padded_rows_in_the_smallest_groups_there_are():
    """Groups of consecutive lengths, by trying all of them."""
    for seed, count in itertools.product(range(5), (2, 3, 4)):
        lengths = sorted(lengths_of(9, seed), reverse=True)
        cuts = ([0, *inner, 9] for inner in itertools.combinations(range(1, 9), count - 1))
        best = min(max((b - a) * lengths[a] for a, b in itertools.pairwise(one)) for one in cuts)
        assert max(size_of([lengths[p] for p in group], False) for group in spread(lengths, count, False)) == best


@pytest.mark.parametrize('packed', [True, False])
def test_no_rank_waits_for_the_one_with_the_longest_rows(packed):
    told = in_turn(lengths_of(256), owners=8, count=8)
    found = arranged(told, Balancing(), packed)
    rows = [list(itertools.chain.from_iterable(batches)) for batches in told]
    assert sorted(p for batches in found for batch in batches for p in batch) == [(o, n) for o in range(8) for n in range(len(rows[o]))]
    assert all(len(batches) == 8 for batches in found)
    before = [[size_of([row.tokens for row in batch], packed) for batch in batches] for batches in told]
    after = sizes(told, found, packed)
    assert max(map(sum, after)) < max(map(sum, before)) and max(map(max, after)) <= max(map(max, before))
    mean = sum(map(sum, after)) / 8
    assert max(map(sum, after)) < 1.06 * mean
    assert (max(map(sum, before)) > 1.1 * mean) and sum(map(sum, after)) <= sum(map(sum, before))


def test_what_is_as_good_stays():
    assert arranged([[[Told(5)], [Told(5)]], [[Told(5)], [Told(5)]]], Balancing(), True) is None
    assert arranged([[[Told(9)], [Told(4), Told(4)]]], Balancing(), True) is None


def test_rows_with_images_and_those_that_a_server_is_asked_about_stay_on_their_rank():
    told = [[[Told(100)], [Told(90), Told(80)]], [[Told(1)], [Told(2), Told(9, is_large=True)]]]
    for rows, how in ((told, Balancing()), ([[[Told(r.tokens) for r in b] for b in o] for o in told], Balancing(moves=False))):
        found = arranged(rows, how, True)
        assert found is None or all(owner == number for number, o in enumerate(found) for batch in o for owner, _ in batch)
    assert arranged([told[0], [[Told(1)], [Told(2), Told(9)]]], Balancing(), True) is not None


def test_fillers_are_left_out_where_rows_are_enough():
    filler = Told(50, counts=False)
    told = [[[Told(10), Told(11)], [Told(12)]], [[filler], [filler]]]
    found = arranged(told, Balancing(), True)
    assert sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(found))) == [(0, 0), (0, 1), (0, 2)]
    assert [sorted(map(len, batches)) for batches in found] in ([[1, 1], [0, 1]], [[0, 1], [1, 1]])


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('tokens', [1, 500, 2048, 5000, 10**6])
def test_as_many_micro_batches_as_tokens_allow(packed, tokens):
    told = in_turn(lengths_of(64), owners=4, count=16)
    found = arranged(told, Balancing(tokens=tokens, at_least=4, multiple=3), packed)
    counts = {len(batches) for batches in found}
    assert len(counts) == 1 and counts.pop() % 3 == 0
    assert all(
        len(batch) < 2 or size <= tokens
        for o, s in zip(found, sizes(told, found, packed), strict=True)
        for batch, size in zip(o, s, strict=True)
    )
    assert sorted(p for o in found for batch in o for p in batch) == [(o, n) for o in range(4) for n in range(16)]
    assert len(found[0]) >= 4 and (tokens < 5000 or len(found[0]) < 16)
