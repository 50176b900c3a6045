from __future__ import annotations

import json
import math
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sstf.errors import DamagedDataError
from sstf.trees.calibration import BOUNDS, CalibrationError, PathCalibration

FOREVER = 1e12  # half-life without forgetting


def chance(calibration: PathCalibration, confidence: float, depth: int = 1, rank: int = 0) -> float:
    """Of one child, among better siblings that say 0."""
    row = torch.zeros(1, rank + 1, dtype=torch.float64)
    row[0, rank] = confidence
    return float(calibration.probabilities(row, depth)[0, rank])


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_without_history_the_confidence_is_returned_as_it_is() -> None:
    confidence = torch.rand(7, 20, generator=torch.Generator().manual_seed(0))
    confidence[0, :3] = torch.tensor([1.0, 0.5, 31 / 32])
    for depth in (1, 3, 8, 40):
        assert torch.equal(PathCalibration().probabilities(confidence, depth), confidence)


def test_an_overconfident_cell_scales_the_confidence() -> None:
    """Two observations of 0.5 and 0.7, one accepted. Their bin is [1/2, 3/4), so 8 pseudo-observations at 0.625."""
    calibration = PathCalibration(half_life=FOREVER, prior=8)
    calibration.observe([2, 2], [1, 1], [0.5, 0.7], [1.0, 0.0])
    ratio = (8 * 0.625 + 1) / (8 * 0.625 + 1.2)
    for confidence in (0.5, 0.6, 0.74):
        assert chance(calibration, confidence, depth=2, rank=1) == pytest.approx(confidence * ratio, rel=1e-6)
    # No other cell has changed.
    assert chance(calibration, 0.6, depth=1, rank=1) == pytest.approx(0.6)
    assert chance(calibration, 0.6, depth=2, rank=0) == pytest.approx(0.6)
    assert chance(calibration, 0.49, depth=2, rank=1) == pytest.approx(0.49)


def test_a_modest_cell_scales_the_doubt() -> None:
    calibration = PathCalibration(half_life=FOREVER, prior=8)
    calibration.observe([2, 2], [1, 1], [0.5, 0.7], [1.0, 1.0])
    ratio = (8 * 0.375 + 0) / (8 * 0.375 + 0.8)
    for confidence in (0.5, 0.6, 0.74):
        expected = 1 - (1 - confidence) * ratio
        assert chance(calibration, confidence, depth=2, rank=1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("hits", (0, 3, 10))
def test_at_the_middle_of_a_bin_it_is_a_beta_posterior(hits: int) -> None:
    calibration = PathCalibration(half_life=FOREVER, prior=8)
    for hit in [1.0] * hits + [0.0] * (10 - hits):
        calibration.observe([1], [0], [0.625], [hit])
    assert chance(calibration, 0.625) == pytest.approx((8 * 0.625 + hits) / 18, rel=1e-6)


def test_a_head_that_says_one_is_corrected() -> None:
    calibration = PathCalibration(half_life=FOREVER, prior=1)
    for hit in (0.0, 1.0) * 500:
        calibration.observe([1], [0], [1.0], [hit])
    assert chance(calibration, 1.0) == pytest.approx(0.5, abs=0.001)


def test_older_observations_weigh_less() -> None:
    """Half-life of one observation: weights 1/4, 1/2, 1."""
    calibration = PathCalibration(half_life=1, prior=4)
    for hit in (1.0, 1.0, 0.0):
        calibration.observe([1], [0], [0.625], [hit])
    assert chance(calibration, 0.625) == pytest.approx((4 * 0.625 + 0.75) / (4 + 1.75), rel=1e-6)


def test_the_nodes_of_one_pass_are_simultaneous() -> None:
    calibration = PathCalibration(half_life=2, prior=4)
    calibration.observe([1], [0], [0.625], [1.0])
    calibration.observe([1, 1], [0, 0], [0.625, 0.625], [0.0, 0.25])
    assert chance(calibration, 0.625) == pytest.approx((4 * 0.625 + 0.5 + 0.25) / (4 + 2.5), rel=1e-6)


def test_a_cell_without_news_forgets_slowly() -> None:
    calibration = PathCalibration(half_life=1, prior=4)
    calibration.observe([1], [0], [0.625], [0.0])
    for _ in range(64):
        calibration.observe([2], [0], [0.625], [0.0])
    assert chance(calibration, 0.625) == pytest.approx(4 * 0.625 / 4.5, rel=1e-6)


def test_deep_and_far_candidates_share_a_cell() -> None:
    calibration = PathCalibration(half_life=FOREVER)
    calibration.observe([8, 9, 30], [9, 10, 50], [0.01] * 3, [0.0, 1.0, 0.5])
    expected = chance(calibration, 0.01, depth=8, rank=9)
    assert expected > 0.1
    assert chance(calibration, 0.01, depth=64, rank=127) == expected
    assert (
        chance(calibration, 0.01, depth=7, rank=9) == chance(calibration, 0.01, depth=8, rank=8) == pytest.approx(0.01)
    )
    for ranks in ((3, 4), (5, 8)):
        calibration.observe([1], [ranks[0]], [0.3], [1.0])
        first, last = (chance(calibration, 0.3, rank=rank) for rank in ranks)
        assert first == last > 0.3
        assert chance(calibration, 0.3, rank=ranks[1] + 1) == pytest.approx(0.3)


# ---- a synthetic head ------------------------------------------------------------------------------------------------


def head_step(calibration: PathCalibration, truth: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One pass: 4 siblings at depths 1 and 2, accepted with chance confidence ** truth (overconfident above 1)."""
    confidence = torch.rand(2, 4, generator=generator, dtype=torch.float64).sort(descending=True).values
    real = confidence**truth
    hits = (torch.rand(2, 4, generator=generator, dtype=torch.float64) < real).double()
    depths, ranks = [1] * 4 + [2] * 4, [0, 1, 2, 3] * 2
    calibration.observe(depths, ranks, confidence.flatten().tolist(), hits.flatten().tolist())
    return confidence, real


def distance(calibration: PathCalibration, truth: float, generator: torch.Generator) -> tuple[float, float]:
    """Mean distance of the raw and of the calibrated chances from the true ones, over fresh candidates."""
    raw, calibrated = [], []
    for _ in range(200):
        confidence, real = head_step(PathCalibration(), truth, generator)
        told = torch.cat([calibration.probabilities(confidence[[i]], i + 1) for i in range(2)])
        raw.append((confidence - real).abs().mean())
        calibrated.append((told - real).abs().mean())
    return float(torch.stack(raw).mean()), float(torch.stack(calibrated).mean())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("truth", (3.0, 0.3))
def test_a_wrong_head_is_corrected_and_drift_followed(truth: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calibration = PathCalibration()
    for _ in range(1500):
        head_step(calibration, truth, generator)
    raw, calibrated = distance(calibration, truth, generator)
    assert raw > 0.2 and calibrated < 0.06
    report = calibration.error()
    assert report.calibrated_error < 0.04 < 0.2 < report.raw_error
    assert report.calibrated_brier < report.raw_brier - 0.04

    for _ in range(1500):  # the text has changed: now the head is right
        head_step(calibration, 1.0, generator)
    raw, calibrated = distance(calibration, 1.0, generator)
    assert raw == 0 and calibrated < 0.06


@pytest.mark.parametrize("seed", range(3))
def test_a_good_head_is_hardly_touched(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calibration = PathCalibration()
    for _ in range(1500):
        head_step(calibration, 1.0, generator)
    assert distance(calibration, 1.0, generator)[1] < 0.05
    report = calibration.error()
    assert report.calibrated_error < 0.04
    assert report.calibrated_brier < report.raw_brier + 0.005


def test_the_error_figures_by_hand() -> None:
    calibration = PathCalibration(half_life=FOREVER, prior=8)
    assert calibration.error() == CalibrationError(0, 0, 0, 0, 0)
    calibration.observe([1, 1], [0, 1], [0.625, 0.2], [0.0, 0.0])
    # Told before the outcome was known, so the calibrated chances were the raw ones.
    brier, error = (0.625**2 + 0.2**2) / 2, (0.625 + 0.2) / 2
    assert astuple(calibration.error()) == pytest.approx((brier, brier, error, error, 2))
    calibration.observe([1], [0], [0.625], [1.0])
    told = 5 / 9
    assert astuple(calibration.error()) == pytest.approx(
        (
            (2 * brier + 0.375**2) / 3,
            (2 * brier + (1 - told) ** 2) / 3,
            (abs(2 * 0.625 - 1) + 0.2) / 3,
            (abs(0.625 + told - 1) + 0.2) / 3,
            3,
        ),
        rel=1e-6,
    )


def test_the_error_figures_forget() -> None:
    """64 times more slowly than a cell: after 64 observations of a half-life of 1 the first weighs half."""
    calibration = PathCalibration(half_life=1, prior=1)
    calibration.observe([1], [0], [1.0], [0.0])
    calibration.observe([2] * 64, [0] * 64, [0.0] * 64, [0.0] * 64)
    report = calibration.error()
    assert report.weight == pytest.approx(64.5)
    assert report.raw_brier == report.raw_error == pytest.approx(0.5 / 64.5)


# ---- invariants ------------------------------------------------------------------------------------------------------

probability = st.one_of(st.sampled_from([0.0, 1.0, *BOUNDS]), st.floats(0, 1, width=32))
nodes = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 14), probability, probability), min_size=1, max_size=30)


def trained(history: list[list[tuple[int, int, float, float]]], half_life: float, prior: float) -> PathCalibration:
    calibration = PathCalibration(half_life, prior)
    for step in history:
        calibration.observe(*(list(column) for column in zip(*step, strict=True)))
    return calibration


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(nodes, max_size=6),
    half_life=st.floats(0.5, 1e6),
    prior=st.floats(0.01, 100),
    depth=st.integers(1, 12),
)
def test_chances_are_in_range_and_keep_the_order_of_a_cell(
    history: list[list[tuple[int, int, float, float]]], half_life: float, prior: float, depth: int
) -> None:
    calibration = trained(history, half_life, prior)
    edges = [0.0, *BOUNDS, 1.0]
    for low, high in pairwise(edges):
        rising = torch.linspace(low, high, 9)[:-1, None].expand(-1, 12)  # [width, each], one bin
        told = calibration.probabilities(rising, depth)
        assert told.shape == rising.shape and told.dtype == torch.float32
        assert bool((told > 0).all()) and bool((told <= 1).all())
        assert bool((told[1:] >= told[:-1]).all())


@settings(max_examples=40, deadline=None)
@given(history=st.lists(nodes, min_size=1, max_size=6), half_life=st.floats(0.5, 1e6), last=nodes)
def test_agrees_with_a_plain_loop(
    history: list[list[tuple[int, int, float, float]]], half_life: float, last: list[tuple[int, int, float, float]]
) -> None:
    prior = 8.0
    calibration = trained(history, half_life, prior)

    def cell_of(depth: int, rank: int, confidence: float) -> tuple[int, int, int]:
        bucket = next(i for i, worst in enumerate((0, 1, 2, 4, 8, math.inf)) if rank <= worst)
        return min(depth, 8), bucket, sum(confidence >= bound for bound in BOUNDS)

    cells: dict[tuple[int, int, int], list[float]] = {}
    for step in history:
        found = [cell_of(*node[:3]) for node in step]
        for cell in found:
            cells.setdefault(cell, [0.0, 0.0, 0.0])
        for cell, sums in cells.items():
            decay = 0.5 ** (max(found.count(cell), len(step) / 64) / half_life)
            sums[:] = [value * decay for value in sums]
        for cell, (_, _, confidence, accepted) in zip(found, step, strict=True):
            cells[cell] = [a + b for a, b in zip(cells[cell], (1, confidence, accepted), strict=True)]
    edges = [0.0, *BOUNDS, 1.0]
    for depth, rank, confidence, _ in last + history[-1]:
        cell = cell_of(depth, rank, confidence)
        weight, confidences, acceptances = cells.get(cell, [0.0, 0.0, 0.0])
        middle = (edges[cell[2]] + edges[cell[2] + 1]) / 2
        total, expected, actual = weight + prior, confidences + prior * middle, acceptances + prior * middle
        over = actual <= expected
        told = confidence * actual / expected if over else 1 - (1 - confidence) * (total - actual) / (total - expected)
        assert chance(calibration, confidence, depth, rank) == pytest.approx(told, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_every_dtype(dtype: torch.dtype) -> None:
    calibration = PathCalibration()
    for _ in range(50):
        calibration.observe([1, 1], [0, 1], [0.99, 0.0], [0.0, 0.0])
    confidence = torch.tensor([[0.99, 0.0], [15 / 16, 1e-3]], dtype=dtype)
    told = calibration.probabilities(confidence, 1)
    assert told.dtype == dtype
    assert bool((told > 0).all()) and bool((told <= 1).all())
    assert float(told[0, 0]) < 0.2 and float(told[1, 0]) == 15 / 16


def test_history_kept_in_inference_mode_serves_outside_it() -> None:
    calibration = PathCalibration()
    with torch.inference_mode():
        calibration.observe([1], [0], [0.6], [0.0])
        inside = calibration.probabilities(torch.tensor([[0.6]]), 1).clone()
    assert torch.equal(calibration.probabilities(torch.tensor([[0.6]]), 1), inside)
    calibration.observe([1], [0], [0.6], [0.0])
    assert bool((calibration.probabilities(torch.tensor([[0.6]]), 1) < inside).all())


def test_a_pass_without_nodes_changes_nothing() -> None:
    calibration = PathCalibration()
    before = calibration.to_json()
    calibration.observe([], [], [], [])
    assert calibration.to_json() == before


# ---- saving ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(history=st.lists(nodes, max_size=4), half_life=st.floats(0.5, 1e6))
def test_a_round_trip_changes_nothing(history: list[list[tuple[int, int, float, float]]], half_life: float) -> None:
    calibration = trained(history, half_life, 8)
    again = PathCalibration.from_json(json.loads(json.dumps(calibration.to_json())))
    confidence = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    for twin in (calibration, again):
        twin.observe([1, 3], [0, 2], [0.9, 0.2], [1.0, 0.3])
    for depth in range(1, 10):
        assert torch.equal(calibration.probabilities(confidence, depth), again.probabilities(confidence, depth))
    assert again.error() == calibration.error()
    assert again.to_json() == calibration.to_json()


GOOD = trained([[(1, 0, 0.5, 1.0)]], 100, 8).to_json()


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        "calibrated",
        {},
        GOOD | {"bounds": [0.5]},
        GOOD | {"half_life": 0},
        GOOD | {"prior": "much"},
        GOOD | {"cells": [-1]},
        GOOD | {"cells": [480]},
        GOOD | {"cells": [1, 2]},
        GOOD | {"cells": None},
        GOOD | {"history": [[1.0], [0.5], [math.nan]]},
        GOOD | {"history": [[1.0], [0.5], [-1.0]]},
        GOOD | {"history": [[1.0], [0.5], [2.0]]},
        GOOD | {"bins": [[0.0]]},
        GOOD | {"squares": [math.inf, 0.0]},
    ],
)
def test_nonsense_is_refused(nonsense: object) -> None:
    with pytest.raises(DamagedDataError, match=r"the acceptance history is damaged .*; delete it"):
        PathCalibration.from_json(nonsense)


def test_bad_use_is_refused() -> None:
    for arguments in ((0, 8), (-1, 8), (math.nan, 8), (256, 0), (256, math.inf)):
        with pytest.raises(ValueError, match="expected positive numbers"):
            PathCalibration(*arguments)
    calibration = PathCalibration()
    with pytest.raises(ValueError, match="one of each"):
        calibration.observe([1, 2], [0], [0.5], [1.0])
    for bad in ((0, 0, 0.5, 1.0), (1, -1, 0.5, 1.0), (1, 0, 1.5, 1.0), (1, 0, 0.5, -1.0), (1, 0, math.nan, 1.0)):
        with pytest.raises(ValueError, match="expected depths from 1"):
            calibration.observe(*([value] for value in bad))
