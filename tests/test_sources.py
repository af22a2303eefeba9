"""Sources are a pure function of seed, epoch and row."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gkd_plugin import sources

NUMBER = st.integers(0, 2**40)


@given(NUMBER, NUMBER, NUMBER)
def test_uniform_is_a_function_of_its_arguments(seed, epoch, row):
    u = sources.uniform(seed, epoch, row)
    assert 0 <= u < 1 and u == sources.uniform(seed, epoch, row)


def test_known_values():
    # Written down once: a change would change every run that is resumed.
    assert sources.uniform(42, 0, 0) == pytest.approx(KNOWN[0]) and sources.uniform(42, 3, 17) == pytest.approx(KNOWN[1])
    assert sources.sampling_seed(42, 0, 5, 'student') == KNOWN[2]


KNOWN = (0.09154919863008426, 0.19235888879258578, 4554311048430172)


@pytest.mark.parametrize('lmbda', [0.0, 0.1, 0.5, 0.93, 1.0])
def test_share_converges_to_lambda(lmbda):
    drawn = [sources.draw_source(sources.uniform(7, epoch, row), lmbda, seq_kd=False) for epoch in range(2) for row in range(5000)]
    share = drawn.count('student') / len(drawn)
    assert share == lmbda if lmbda in (0, 1) else abs(share - lmbda) < 4 * (lmbda * (1 - lmbda) / len(drawn)) ** 0.5
    assert set(drawn) <= {'student', 'dataset'}


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_exactly_one_source(u, lmbda):
    assert sources.draw_source(u, lmbda, True) == ('student' if u < lmbda else 'teacher')
    assert sources.draw_source(u, lmbda, False) == ('student' if u < lmbda else 'dataset')


def test_epochs_rows_seeds_and_purposes_are_independent():
    base = [sources.uniform(1, 0, row) for row in range(2000)]
    for other in (
        [sources.uniform(2, 0, row) for row in range(2000)],
        [sources.uniform(1, 1, row) for row in range(2000)],
        [sources.uniform(1, 0, row + 1) for row in range(2000)],
        [sources.uniform(1, 0, row, 'cycle') for row in range(2000)],
    ):
        mean = sum((a - 0.5) * (b - 0.5) for a, b in zip(base, other, strict=True)) / len(base)
        assert abs(mean) < 4 / 12 / len(base) ** 0.5


@given(NUMBER, NUMBER, st.data(), st.integers(2, 1000))
def test_a_replacement_is_another_row_of_the_dataset(seed, epoch, data, num_rows):
    row = data.draw(st.integers(0, num_rows - 1))
    drawn = [sources.replacement_row(seed, epoch, row, attempt, num_rows) for attempt in range(20)]
    assert all(0 <= n < num_rows and n != row for n in drawn)
    assert drawn == [sources.replacement_row(seed, epoch, row, attempt, num_rows) for attempt in range(20)]


def test_rows_that_may_stand_in_are_equally_likely():
    drawn = Counter(sources.replacement_row(7, epoch, 2, attempt, 5) for epoch in range(200) for attempt in range(20))
    assert sorted(drawn) == [0, 1, 3, 4] and max(drawn.values()) < 1.2 * min(drawn.values())
    # Where the row itself was not drawn, it is the row that it was before there was an exception.
    assert [sources.replacement_row(42, 0, row, 0, 1000) for row in (0, 1, 2)] == [384, 193, 976]
    assert (
        sources.drew_itself(42, 0, 5, 2, 10) and sources.replacement_row(42, 0, 5, 2, 10) != 5 and not sources.drew_itself(42, 0, 5, 1, 10)
    )
