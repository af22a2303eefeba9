"""Sources are a pure function of seed, epoch and row."""

from __future__ import annotations

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


@given(NUMBER, NUMBER, NUMBER, st.integers(1, 1000))
def test_a_replacement_is_a_row_of_the_dataset(seed, epoch, row, num_rows):
    drawn = [sources.replacement_row(seed, epoch, row, attempt, num_rows) for attempt in range(20)]
    assert all(0 <= n < num_rows for n in drawn)
    assert drawn == [sources.replacement_row(seed, epoch, row, attempt, num_rows) for attempt in range(20)]
