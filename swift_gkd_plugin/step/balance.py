"""The rows of a step in micro-batches of about as many tokens each, over all ranks that have rows of their own.

How long a response is shows when it is there. By then rows have come to ranks and micro-batches in turn, so that all ranks wait for the
one with the longest, and the micro-batch of the longest decides how much memory a step takes. A step has one denominator: any arrangement
of its rows gives the same step.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import torch

from .ranks import Ranks
from .samples import Sample, SampleEncoder

# Bytes of the tensors of a row that stays on its rank. Token ids are no tensors; places in three dimensions are a few kilobytes.
LARGE = 1 << 20

Place = tuple[int, int]  # the owner of a row, and its number among the rows of this owner


@dataclass(frozen=True)
class Balancing:
    """How micro-batches are wanted.

    Attributes:
        tokens: At most in each, padding included, ``--gkd_micro_batch_tokens``; a longer row is alone, and there are as many micro-batches
            as that takes. None for as many as the rows came in.
        at_least: So many are wanted with ``tokens``, if the rows came in as many.
        multiple: The number of a rank's micro-batches has to be one of this.
        moves: Rows may go to other ranks.
    """

    tokens: int | None = None
    at_least: int = 1
    multiple: int = 1
    moves: bool = True


@dataclass(frozen=True)
class Told:
    """What all owners know of a row.

    Attributes:
        tokens: Of the student's view.
        counts: False for a filler.
        is_large: To send it takes longer than it may save: it has media.
    """

    tokens: int
    counts: bool = True
    is_large: bool = False


def size_of(lengths: list[int], packed: bool) -> int:
    """Tokens of a micro-batch with rows of these lengths."""
    return sum(lengths) if packed else len(lengths) * max(lengths, default=0)


def spread(lengths: list[int], count: int, packed: bool, tokens: int | None = None) -> list[list[int]]:
    """Places of rows of these lengths in ``count`` groups of about the same size; some are empty if there are fewer rows.

    Args:
        tokens: Padded rows do with so many in a group, unless one is alone.
    """
    if packed:
        groups: list[list[int]] = [[] for _ in range(count)]
        smallest = [(0, number) for number in range(count)]
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            size, number = heapq.heappop(smallest)
            groups[number].append(place)
            heapq.heappush(smallest, (size + lengths[place], number))
        return groups
    low = high = tokens
    if tokens is None:
        low, high = max(lengths, default=0), len(lengths) * max(lengths, default=0)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    groups = _cut(lengths, low)
    while len(groups) < min(count, len(lengths)):
        largest = max((g for g in groups if len(g) > 1), key=lambda g: len(g) * lengths[g[0]])
        half = len(largest) // 2
        groups.append(largest[half:])
        del largest[half:]
    return groups + [[] for _ in range(count - len(groups))]


def _cut(lengths: list[int], tokens: int) -> list[list[int]]:
    """The same in as few groups of at most so many tokens as there can be, where rows are padded to the longest of their group; a longer
    row is alone."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _how_many(lengths: list[int], owners: int, how: Balancing, packed: bool) -> int:
    """Micro-batches of each of these owners that it takes with ``tokens``."""
    if not packed:
        return -(-len(_cut(lengths, how.tokens)) // owners)
    count = max(-(-sum(lengths) // (how.tokens * owners)), 1)
    while count * owners < len(lengths):
        groups = ([lengths[place] for place in group] for group in spread(lengths, count * owners, packed))
        if all(len(group) == 1 or sum(group) <= how.tokens for group in groups):
            break
        count += 1
    return count


def arranged(told: list[list[list[Told]]], how: Balancing, packed: bool) -> list[list[list[Place]]] | None:
    """The rows of a step in new micro-batches, the largest of each owner first; None if they are no better than the ones there are. An
    empty micro-batch is for a filler.

    Args:
        told: Of each owner the micro-batches, as many of each.
        packed: Rows of a micro-batch come one after the other, without padding.
    """
    owners, count = range(len(told)), len(told[0])
    rows = {(o, n): row for o in owners for n, row in enumerate(itertools.chain.from_iterable(told[o])) if row.counts}
    pools = [(list(owners), list(rows))]
    if not how.moves or any(row.is_large for row in rows.values()):
        pools = [([owner], [place for place in rows if place[0] == owner]) for owner in owners]
    if how.tokens is not None:
        count = max(min(count, how.at_least), *(_how_many([rows[p].tokens for p in places], len(of), how, packed) for of, places in pools))
        count = -(-count // how.multiple) * how.multiple
    found: list[list[list[Place]]] = [[] for _ in owners]
    for of, places in pools:
        lengths = [rows[place].tokens for place in places]
        groups = spread(lengths, count * len(of), packed, how.tokens)
        sizes = [size_of([lengths[i] for i in group], packed) for group in groups]
        largest_first = sorted(range(len(groups)), key=lambda number: -sizes[number])
        has = dict.fromkeys(of, 0)
        for turn in range(count):  # every owner gets one, and who has least gets the largest
            these = largest_first[turn * len(of) : (turn + 1) * len(of)]
            for owner, number in zip(sorted(of, key=has.__getitem__), these, strict=True):
                found[owner].append(sorted(places[i] for i in groups[number]))
                has[owner] += sizes[number]
    before = [[size_of([row.tokens for row in batch], packed) for batch in batches] for batches in told]
    after = [[size_of([rows[place].tokens for place in batch], packed) for batch in batches] for batches in found]
    # Of the slowest rank, and of the largest micro-batch.
    old, new = ((max(map(sum, sizes)), max(map(max, sizes))) for sizes in (before, after))
    better = new != old and all(n <= o for n, o in zip(new, old, strict=True))
    return found if better or how.tokens is not None else None


def balanced(step: list[list[Sample]], encoder: SampleEncoder, ranks: Ranks, how: Balancing) -> list[list[Sample]]:
    """The micro-batches of a step, arranged anew over all owners. A collective call.

    Args:
        step: Those of this rank, with their responses. What goes to another rank is without its tensors here afterwards.
    """
    mine = [sample for samples in step for sample in samples]
    told = ranks.of_owners([[_told(sample, encoder) for sample in samples] for samples in step])
    found = arranged(told, how, encoder.template.padding_free)
    if found is None:
        return step
    me = ranks.owner
    outgoing: list[dict[int, Sample]] = [
        {number: mine[number] for owner, number in itertools.chain.from_iterable(batches) if owner == me} for batches in found
    ]
    come = ranks.exchanged(outgoing) if any(owner != to for to, b in enumerate(found) for p in b for owner, _ in p) else outgoing
    for to, samples in enumerate(outgoing):
        for sample in samples.values() if to != me else ():
            sample.views = sample.encoded = sample.prompts = None
    spare = next((sample for sample in mine if not sample.row.counts), None) or Sample(mine[0].row.filler(), mine[0].row.content)
    return [[come[owner][number] for owner, number in batch] or [_copy(spare)] for batch in found[me]]


def _copy(filler: Sample) -> Sample:
    return Sample(filler.row, filler.content)


def _told(sample: Sample, encoder: SampleEncoder) -> Told:
    student, teacher = encoder.views(sample)
    tensors = [value for view in (student, teacher or {}) for value in view.values() if isinstance(value, torch.Tensor)]
    return Told(len(student['input_ids']), sample.row.counts, sum(tensor.nbytes for tensor in tensors) > LARGE)
