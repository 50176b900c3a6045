"""Every figure of a bench against values worked out by hand, and the weighted percentiles against repeated values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.bench.client import Answer
from sstf.bench.figures import (
    PERCENTILES,
    Samples,
    draws,
    interval,
    is_good,
    latencies,
    percentiles,
    resampled,
    samples,
    throughput,
    tpot,
)


def answer(name: str, ttft: float, *gaps: float, tokens: int | None = None) -> Answer:
    return Answer(name, 0.0, ttft, gaps, ttft + sum(gaps), "x", tokens)


FAILED = Answer("f", 0.0, error="500: no")
# Two tokens an event in the second one, as from a server that speculates.
ANSWERS = [answer("1", 0.1, 0.2, 0.2, tokens=3), FAILED, answer("2", 0.3, 0.4, tokens=3), answer("3", 0.5, tokens=1)]


def test_values_of_each_metric_by_hand() -> None:
    assert samples(ANSWERS, "ttft").values == pytest.approx([0.1, 0.3, 0.5])
    assert samples(ANSWERS, "ttft").owners.tolist() == [0, 2, 3]
    assert samples(ANSWERS, "itl").values == pytest.approx([0.2, 0.2, 0.4])
    assert samples(ANSWERS, "itl").owners.tolist() == [0, 0, 2]
    # (0.5 - 0.1) / 2 and (0.7 - 0.3) / 2; an answer of one token has no time after the first
    assert samples(ANSWERS, "tpot").values == pytest.approx([0.2, 0.2])
    assert samples(ANSWERS, "e2e").values == pytest.approx([0.5, 0.5, 0.7])
    assert tpot(answer("4", 0.1, 0.2)) is None  # the server does not count


def test_percentiles_by_hand() -> None:
    # Over 1, 2, 3, 4, 5: P50 is the third; P95 lies at place 3.8, P99 at 3.96
    found = Samples(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.arange(5))
    assert percentiles(found) == pytest.approx([3.0, 4.8, 4.96])
    # The request of 5 drawn twice, those of 1 and 2 not: 3, 4, 5, 5
    assert percentiles(found, np.array([0, 0, 1, 1, 2])) == pytest.approx([4.5, 5.0, 5.0])
    assert np.isnan(percentiles(found, np.zeros(5, dtype=np.int64))).all()


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 5)), min_size=1, max_size=30),
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
def test_weighted_percentiles_are_those_of_repeated_values(pairs: list[tuple[float, int]], counts: list[int]) -> None:
    pairs = sorted(pairs)
    found = Samples(np.array([v for v, _ in pairs]), np.array([o for _, o in pairs], dtype=np.int64))
    repeated = [value for value, owner in pairs for _ in range(counts[owner])]
    weighted = percentiles(found, np.array(counts))
    if repeated:
        assert weighted == pytest.approx(np.percentile(repeated, PERCENTILES), rel=1e-9, abs=1e-12)
    else:
        assert np.isnan(weighted).all()


def test_draws_are_samples_of_the_requests() -> None:
    drawn = draws(7)
    assert drawn.shape == (1000, 7)
    assert (drawn.sum(axis=1) == 7).all()


def test_a_server_that_takes_twice_as_long_has_the_ratio_2_without_doubt() -> None:
    times = np.random.default_rng(1).uniform(0.1, 5.0, 20)
    baseline = [answer(str(i), t, t / 3, tokens=2) for i, t in enumerate(times)]
    candidate = [answer(str(i), 2 * t, 2 * t / 3, tokens=2) for i, t in enumerate(times)]
    for metric in ("ttft", "itl", "tpot", "e2e"):
        found = latencies(baseline, candidate, metric, draws(20))
        for old, new, ratio in zip(found.baseline, found.candidate, found.ratio, strict=True):
            assert old and new and ratio
            assert old.low <= old.value <= old.high
            assert new.value == pytest.approx(2 * old.value)
            assert ratio.to_json() == pytest.approx([2.0, 2.0, 2.0])  # answers to one request stay together


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        found = samples([answer(str(i), float(t)) for i, t in enumerate(rng.exponential(1.0, 50))], "ttft")
        middle = interval(percentiles(found)[0], resampled(found, draws(50, seed))[:, 0])
        assert middle
        covered += middle.low <= np.log(2) <= middle.high  # the median of the exponential distribution
    assert 52 <= covered < 60  # 57 at 95 %


def test_a_metric_that_no_answer_has_is_none() -> None:
    found = latencies([FAILED, FAILED], [ANSWERS[0], ANSWERS[2]], "e2e", draws(2))
    assert found.baseline == [None] * 3
    assert found.ratio == [None] * 3
    assert found.candidate[0] is not None


def test_throughput_and_goodput_by_hand() -> None:
    # 3 whole answers of 3 + 3 + 1 tokens in 2 s; the third one's first token comes too late
    flow = throughput(ANSWERS, 2.0, {"ttft": 0.3})
    assert (flow.requests, flow.failed) == (4, 1)
    assert flow.requests_per_s == pytest.approx(1.5)
    assert flow.tokens_per_s == pytest.approx(3.5)
    assert flow.goodput == pytest.approx(1.0)
    assert flow.good_share == pytest.approx(0.5)  # the failed request counts
    assert throughput(ANSWERS, 2.0, {}).goodput is None
    assert throughput([*ANSWERS, answer("5", 0.1)], 2.0, {}).tokens_per_s is None


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        ({"ttft": 0.1}, True),
        ({"ttft": 0.09}, False),
        ({"itl": 0.3}, True),
        ({"itl": 0.29}, False),  # its longest gap
        ({"tpot": 0.2}, True),
        ({"tpot": 0.19}, False),
        ({"e2e": 0.5}, True),
        ({"e2e": 0.5, "itl": 0.2}, False),
    ],
)
def test_an_objective_is_met_or_not(objective: dict, good: bool) -> None:
    assert is_good(Answer("1", 0.0, 0.1, (0.1, 0.3), 0.5, "x", 3), objective) is good


def test_a_failed_request_is_never_good() -> None:
    assert not is_good(FAILED, {"e2e": 100.0})
