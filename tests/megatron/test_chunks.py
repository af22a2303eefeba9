"""What the virtual stages of a rank read."""

from __future__ import annotations

import weakref

import pytest

from swift_gkd_plugin.megatron.chunks import for_each_chunk


class Batch:
    pass


@pytest.mark.parametrize('chunks', [1, 2, 3])
def test_a_batch_is_made_once_and_goes_when_the_last_chunk_has_read_it(chunks):
    alive, made = weakref.WeakSet(), []

    def batches():
        for number in range(8):
            batch = Batch()
            alive.add(batch)
            made.append(number)
            yield batch
            del batch

    readers = for_each_chunk(batches(), chunks)
    for number in range(8):
        ids = {id(batch) for batch in map(next, readers)}
        assert len(ids) == 1 and made == list(range(number + 1)) and len(alive) <= 1
    assert [next(reader, None) for reader in readers] == [None] * chunks


def test_chunks_may_be_ahead_of_others():
    first, second = for_each_chunk(iter('abcd'), 2)
    assert [next(first), next(first), next(second), next(first)] == ['a', 'b', 'a', 'c']
    assert list(second) == ['b', 'c', 'd'] and list(first) == ['d']
