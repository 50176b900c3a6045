from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.decode.cost import KNOTS, CostModel
from sstf.errors import DamagedDataError

#        rows   1    2    4    8    16   24   32   48   64
MILLISECONDS = (4.0, 4.0, 4.0, 4.0, 6.0, 7.0, 8.0, 12.0, 16.0)


def model(draft: float = 1.0, host: float = 0.5, plain_host: float | None = None) -> CostModel:
    seconds = [value / 1000 for value in MILLISECONDS]
    return CostModel(seconds, draft / 1000, host / 1000, None if plain_host is None else plain_host / 1000)


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, milliseconds",
    [(1, 4), (3, 4), (8, 4), (12, 5), (16, 6), (20, 6.5), (25, 7.125), (40, 10), (64, 16), (65, 16.25), (128, 32)],
)
def test_verify_is_straight_between_knots_and_beyond(rows: int, milliseconds: float) -> None:
    assert model().verify(rows) == pytest.approx(milliseconds / 1000)


def test_more_rows_are_never_cheaper() -> None:
    costs = CostModel([4, 3, 3, 5, 4, 6, 6, 6, 5], 0, 0)
    assert costs.verify_s == [4, 4, 4, 5, 5, 6, 6, 6, 6]
    assert costs.verify(1000) == 6


def test_a_step_and_its_speedup() -> None:
    costs = model(draft=1.0, host=0.5)
    assert costs.step(depth=4, nodes=15) == pytest.approx((4 * 1 + 6 + 0.5) / 1000)
    assert costs.plain_step() == pytest.approx(4.5 / 1000)
    assert costs.speedup(3.5, depth=4, nodes=15) == pytest.approx(3.5 * 4.5 / 10.5)
    # Plain decoding has host work of its own, which is less where it was measured.
    assert model(plain_host=0.2).speedup(3.5, 4, 15) == pytest.approx(3.5 * 4.2 / 10.5)


def test_best_size() -> None:
    """Up to 8 rows (7 nodes) cost 4 ms, the next 8 add 0.25 ms each; a step with 2 levels has 2.5 ms beside."""
    costs = model()
    assert costs.best_size([0.1] * 7, depth=2) == 7  # free
    assert costs.best_size([], depth=2) == 0
    assert costs.best_size([0.0] * 7, depth=2) == 0  # of equals the smallest
    # 7 nodes: 2.4 tokens in 6.5 ms. A node more takes 0.25 ms, worth 0.25 / 6.5 * 2.4 = 0.0923 tokens.
    assert costs.best_size([0.2] * 7 + [0.091] * 8, depth=2) == 7
    assert costs.best_size([0.2] * 7 + [0.094] * 8, depth=2) == 15
    # A deeper draft makes every step dearer, so a node has to add less.
    assert costs.best_size([0.2] * 7 + [0.091] * 8, depth=3) == 15


def test_another_level() -> None:
    """One level, one node of chance 0.8: 1.8 tokens in 1 + 4 + 0.5 ms. A level more takes 1 ms."""
    costs = model()
    assert 1.8 / 5.5 < 2.6 / 6.5
    assert costs.worth_another_level([0.8], [0.8], depth=1)
    # With its child at 0.5 * 0.8: 2.2 / 6.5 is still more; at 0.4 * 0.8: 2.12 / 6.5 is less.
    assert costs.worth_another_level([0.8], [0.8], depth=1, keep=0.5)
    assert not costs.worth_another_level([0.8], [0.8], depth=1, keep=0.4)
    # 0.2 tokens are not worth 1 ms even if every child is accepted: 1.4 / 6.5 against 1.2 / 5.5.
    assert not costs.worth_another_level([0.2], [0.2], depth=1)
    assert not costs.worth_another_level([0.2], [], depth=1)


def test_the_new_level_may_displace_worse_candidates() -> None:
    """Rows beyond the eighth cost so much here that 8 is the best number: the child takes a poor node's place."""
    costs = CostModel([4, 4, 4, 4, 40, 80, 120, 200, 280], 1, 0)
    gains = [0.9, *[0.05] * 6]
    assert costs.best_size(gains, depth=1) == 7
    # 1.9 + 0.3 in 5 s = 0.44, against 1.9 + 0.9 + 5 * 0.05 in 6 s = 0.508
    assert costs.worth_another_level(gains, [0.9], depth=1)
    # keep 0.6: 1.9 + 0.54 + 0.25 in 6 s = 0.448; keep 0.5: 1.9 + 0.45 + 0.25 in 6 s = 0.433
    assert costs.worth_another_level(gains, [0.9], depth=1, keep=0.6)
    assert not costs.worth_another_level(gains, [0.9], depth=1, keep=0.5)


# ---- measurements ----------------------------------------------------------------------------------------------------


def test_a_measurement_moves_an_estimate_by_a_tenth_of_the_difference() -> None:
    costs = model(draft=1.0, host=0.5)
    costs.observe(depth=4, nodes=15, draft_s=6e-3, verify_s=7e-3, host_s=0.4e-3)
    assert costs.draft_s == pytest.approx(1.05e-3)  # 1.5 ms a level were measured
    assert costs.verify(16) == pytest.approx(6.1e-3)
    assert costs.host_s == pytest.approx(0.49e-3)
    assert costs.plain_host_s == pytest.approx(0.5e-3)
    moved = [round(value * 1000, 9) for value in costs.verify_s]
    assert moved == [4, 4, 4, 4, 6.1, 7, 8, 12, 16]  # rows at a knot move that knot


def test_a_measurement_between_knots_moves_both() -> None:
    """12 rows: 5 ms estimated, 6 ms measured, so 0.1 ms more; each knot by a share of its own size, here 2 %."""
    costs = model()
    costs.observe(depth=1, nodes=11, draft_s=1e-3, verify_s=6e-3, host_s=0)
    assert costs.verify(12) == pytest.approx(5.1e-3)
    assert costs.verify_s[3] == pytest.approx(4.08e-3)
    assert costs.verify_s[4] == pytest.approx(6.12e-3)
    assert costs.verify_s[0] == 4e-3


def test_beyond_the_last_knot_the_last_two_move_alike() -> None:
    costs = model()
    costs.observe(depth=1, nodes=127, draft_s=1e-3, verify_s=40e-3, host_s=0)
    assert costs.verify(128) == pytest.approx(32.8e-3)
    assert costs.verify_s[-2:] == pytest.approx([12.3e-3, 16.4e-3])


def test_the_newest_measurement_moves_knots_that_contradict_it() -> None:
    costs = model()
    for _ in range(100):
        costs.observe(depth=1, nodes=7, draft_s=1e-3, verify_s=2e-3, host_s=0)
    assert costs.verify_s[:4] == pytest.approx([2e-3] * 4, rel=1e-3)  # fewer rows cannot take longer
    assert costs.verify_s[4:] == model().verify_s[4:]
    for _ in range(100):
        costs.observe(depth=1, nodes=7, draft_s=1e-3, verify_s=10e-3, host_s=0)
    assert costs.verify_s[3:7] == pytest.approx([10e-3] * 4, rel=1e-3)  # more rows cannot take less
    assert costs.verify_s[:3] == pytest.approx([2e-3] * 3, rel=1e-3)
    assert costs.verify_s[7:] == model().verify_s[7:]


def test_a_plain_step_is_averaged_apart() -> None:
    costs = model()
    for _ in range(200):
        costs.observe(depth=0, nodes=0, draft_s=0, verify_s=4e-3, host_s=0.1e-3)
    assert costs.plain_host_s == pytest.approx(0.1e-3, rel=1e-3)
    assert (costs.draft_s, costs.host_s) == (model().draft_s, model().host_s)


def test_a_stall_moves_an_estimate_by_a_twentieth_only() -> None:
    costs = model()
    costs.observe(depth=2, nodes=15, draft_s=100e-3, verify_s=300e-3, host_s=25e-3)
    assert costs.step(2, 15) == pytest.approx(1.05 * model().step(2, 15))
    costs = model()
    costs.observe(depth=2, nodes=15, draft_s=0, verify_s=0, host_s=0)
    assert costs.step(2, 15) == pytest.approx((1 - 0.1 / 3) * model().step(2, 15))


@pytest.mark.parametrize("factor", (10.0, 0.1))
@pytest.mark.parametrize("seed", range(3))
def test_a_lasting_change_is_followed_through_noise_and_stalls(factor: float, seed: int) -> None:
    """Rows vary, every 20th step stalls; 600 steps after a tenfold change the used rows are right within 20 %."""
    source, costs, truth = random.Random(seed), model(), model()
    for _ in range(600):
        rows = source.randint(4, 48)
        stall = 50 if source.random() < 0.05 else 1
        noise = stall * factor * source.gauss(1, 0.03)
        costs.observe(3, rows - 1, 3 * truth.draft_s * noise, truth.verify(rows) * noise, truth.host_s * noise)
    for rows in range(8, 48):
        assert costs.verify(rows) == pytest.approx(factor * truth.verify(rows), rel=0.2)
    assert costs.step(3, 23) == pytest.approx(factor * truth.step(3, 23), rel=0.15)


def test_a_cost_of_zero_can_be_left() -> None:
    costs = CostModel([1e-3] * 9, 0.0, 0.0)
    for _ in range(200):
        costs.observe(2, 4, 2e-3, 1e-3, 1e-4)
    assert (costs.draft_s, costs.host_s) == pytest.approx((1e-3, 1e-4), rel=0.01)


# ---- invariants ------------------------------------------------------------------------------------------------------

seconds = st.floats(1e-6, 1.0)
measurements = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 200), st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(seconds, min_size=9, max_size=9), seconds, seconds, measurements)
def test_stays_positive_and_rising(
    verify_s: list[float], draft_s: float, host_s: float, steps: list[tuple[int, int, float, float, float]]
) -> None:
    costs = CostModel(verify_s, draft_s, host_s)
    for depth, nodes, *measured in steps:
        before = costs.verify(nodes + 1)
        costs.observe(depth, nodes, *measured)
        # The estimate moves towards the measurement, but for rounding.
        after = costs.verify(nodes + 1)
        assert (after - before) * (measured[1] - before) >= -1e-9 * before
    estimates = [costs.verify(rows) for rows in range(1, 130)]
    assert estimates[0] > 0 and all(math.isfinite(value) for value in estimates)
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(estimates))
    assert CostModel.from_json(json.loads(json.dumps(costs.to_json()))).to_json() == costs.to_json()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=40), st.integers(0, 8))
def test_best_size_is_the_maximum(gains: list[float], depth: int) -> None:
    costs, gains = model(), sorted(gains, reverse=True)
    rates = [(1 + sum(gains[:n])) / costs.step(depth, n) for n in range(len(gains) + 1)]
    assert rates[costs.best_size(gains, depth)] == pytest.approx(max(rates))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_a_level_that_is_not_worth_it_never_pays(gains: list[float], children: list[list[float]], depth: int) -> None:
    """Whatever the children's chances are, so long as those of one node's add up to 1 at most."""
    costs, gains = model(), sorted(gains, reverse=True)
    frontier = gains[: len(children)]
    if costs.worth_another_level(gains, frontier, depth):
        return
    level = [
        chance * child / max(1.0, sum(siblings))
        for chance, siblings in zip(frontier, children, strict=False)
        for child in siblings
    ]
    more = sorted([*gains, *level], reverse=True)

    def rate(candidates: list[float], levels: int) -> float:
        size = costs.best_size(candidates, levels)
        return (1 + sum(candidates[:size])) / costs.step(levels, size)

    assert rate(more, depth + 1) <= rate(gains, depth) * (1 + 1e-9)


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = model().to_json()


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        "fast",
        {},
        GOOD | {"extra": 1.0},
        GOOD | {"verify_s": [1.0] * 8},
        GOOD | {"verify_s": [0.0] * 9},
        GOOD | {"verify_s": ["fast"] * 9},
        GOOD | {"draft_s": -1.0},
        GOOD | {"host_s": math.nan},
    ],
)
def test_nonsense_is_refused(nonsense: object) -> None:
    with pytest.raises(DamagedDataError, match=r"the measured costs are damaged .*; delete them"):
        CostModel.from_json(nonsense)


def test_bad_use_is_refused() -> None:
    assert len(MILLISECONDS) == len(KNOTS)
    with pytest.raises(ValueError, match="has 2 times; expected 9"):
        CostModel([1, 2], 0, 0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a finite one"):
            CostModel([bad] * 9, 0, 0)
        with pytest.raises(ValueError, match="expected a finite one"):
            model().observe(1, 1, 1, bad, 1)
    with pytest.raises(ValueError, match="at least 1"):
        model().verify(0)
