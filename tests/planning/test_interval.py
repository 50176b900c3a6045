from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.planning.interval import Interval, mean_length, mean_of


def test_a_mean_and_its_error_by_hand() -> None:
    # mean 5, deviation sqrt((9 + 1 + 1 + 9) / 3) = 2.582, standard error 1.291
    found = mean_of([2, 4, 6, 8])
    assert (found.low, found.high) == pytest.approx((5 - 1.96 * 1.29099, 5 + 1.96 * 1.29099), rel=1e-5)
    # Half of the population was drawn, so the error shrinks by sqrt(1/2).
    half = mean_of([2, 4, 6, 8], population=8)
    assert half.high - 5 == pytest.approx((found.high - 5) * 0.5**0.5)


def test_what_was_drawn_whole_is_exact_and_one_value_is_hardly_known() -> None:
    assert mean_of([1, 2], population=2) == Interval.exact(1.5)
    assert mean_of([7], population=1) == Interval.exact(7)
    assert mean_of([7], population=100) == Interval(0, 14)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.integers(0, 100))
def test_an_interval_holds_the_mean_of_its_sample(values: list[float], more: int) -> None:
    found = mean_of(values, len(values) + more)
    mean = sum(values) / len(values)
    assert found.low <= mean * (1 + 1e-9) and mean <= found.high * (1 + 1e-9) and found.low >= 0


def test_sums_and_multiples() -> None:
    assert Interval(1, 2) + Interval.exact(3) == Interval(4, 5)
    assert Interval(1, 2).times(3) == Interval(3, 6)
    assert Interval(1, 2).middle == 1.5


def test_texts_that_were_watched_to_their_end_have_their_mean() -> None:
    assert mean_length([(3, True), (10, False), (5, True)], limit=10) == mean_of([3, 10, 5])


def test_without_an_end_the_limit_bounds_the_length() -> None:
    # 3 / 60 a token at most: (1 - .95^100) / .05
    found = mean_length([(20, False)] * 3, limit=100)
    assert found.high == 100
    assert found.low == pytest.approx((1 - 0.95**100) / 0.05)


@pytest.mark.parametrize(("chance", "watched"), [(0.02, 40), (0.1, 8), (0.005, 60)])
def test_cut_observations_of_texts_that_end_by_chance(chance: float, watched: int) -> None:
    """The true mean lies in the 95 % interval in 95 of 100 trials; 85 leaves room for the normal approximation."""
    limit, rng = 200, random.Random(5)
    truth = (1 - (1 - chance) ** limit) / chance
    hits = 0
    for _ in range(200):
        observed = []
        for _ in range(48):
            length = next((n for n in range(1, watched + 1) if rng.random() < chance), None)
            observed.append((length or watched, length is not None))
        found = mean_length(observed, limit)
        hits += found.low <= truth <= found.high
    assert hits >= 170
