"""Where texts go apart, and each rule of the advice on both sides of its limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.bench.client import Answer
from sstf.bench.figures import METRICS, draws, latencies
from sstf.bench.requests import CHAT, Request
from sstf.bench.shadow import Advice, Difference, Limits, advise, first_difference


def test_a_difference_by_hand() -> None:
    old, new = "x" * 50 + "The answer is 42." + "y" * 60, "x" * 50 + "The answer is 41!"
    found = first_difference("7", old, new)
    assert found == Difference("7", 65, 127, "x" * 25 + "The answer is 4", "2." + "y" * 38, "1!")


@pytest.mark.parametrize(("old", "new", "at"), [("", "a", 0), ("ab", "abc", 2), ("abc", "ab", 2)])
def test_a_text_that_ends_first(old: str, new: str, at: int) -> None:
    found = first_difference("7", old, new)
    assert found is not None and found.at == at


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_texts_agree_up_to_the_difference_and_not_there(old: str, new: str) -> None:
    found = first_difference("7", old, new)
    if found is None:
        assert old == new
    else:
        assert old[: found.at] == new[: found.at]
        assert old[found.at : found.at + 1] != new[found.at : found.at + 1]


def judge(
    count: int = 20,
    limits: Limits | None = None,
    broken: str | None = None,
    temperature: float | None = 0,
    candidate: dict[int, dict[str, object]] | None = None,
    slower: float = 0.9,
) -> Advice:
    """Baseline: 20 same answers of 10 tokens; candidate: faster, but for the given fields of given answers."""
    requests = [Request(str(i), CHAT, {"temperature": temperature}) for i in range(count)]
    old = [Answer(str(i), 0.0, 1.0, (1.0,), 2.0, "abcdefghij", 10, "length") for i in range(count)]
    new = [replace(answer, ttft_s=slower, gaps_s=(slower,), e2e_s=2 * slower) for answer in old]
    for i, fields in (candidate or {}).items():
        new[i] = replace(new[i], **fields)  # type: ignore[arg-type]
    found = {metric: latencies(old, new, metric, draws(count)) for metric in METRICS}
    return advise(requests, old, new, found, limits or Limits(), broken)


def failing(advice: Advice) -> list[str]:
    return [check.name for check in advice.checks if check.holds is False]


def test_a_candidate_that_is_faster_and_the_same_may_go() -> None:
    advice = judge()
    assert advice.go
    assert advice.reason == "every check holds"
    assert all(check.holds for check in advice.checks)
    assert (advice.compared, advice.greedy, advice.differences) == (20, 20, [])


OTHER = {"text": "abcXefghij"}
FAILED = {"error": "500: no"}


@pytest.mark.parametrize(
    ("settings", "fails"),
    [
        ({"candidate": {0: OTHER, 1: OTHER}}, []),  # 18 of 20 are the 90 % that are asked
        ({"candidate": {0: OTHER, 1: OTHER, 2: OTHER}}, ["identical greedy answers"]),
        ({"candidate": {0: OTHER}, "limits": Limits(identical=1.0)}, ["identical greedy answers"]),
        ({"count": 19}, ["compared requests"]),
        ({"count": 25, "candidate": {0: FAILED}}, ["failures above baseline"]),
        ({"count": 25, "candidate": {0: FAILED}, "limits": Limits(errors=0.04)}, []),
        ({"slower": 1.0}, []),
        ({"slower": 1.05}, ["e2e P50"]),
        ({"slower": 1.15}, ["e2e P50", "e2e P95"]),
        ({"slower": 1.25}, ["ttft P95", "e2e P50", "e2e P95"]),
        ({"candidate": {i: {"tokens": 11} for i in range(20)}}, []),
        ({"candidate": {i: {"tokens": 12} for i in range(20)}}, ["mean length"]),
        ({"candidate": {i: {"tokens": 8} for i in range(20)}}, ["mean length"]),
        ({"broken": "candidate is gone"}, ["both servers"]),
    ],
)
def test_each_rule_on_both_sides_of_its_limit(settings: dict, fails: list[str]) -> None:
    advice = judge(**settings)
    assert failing(advice) == fails
    assert advice.go is not bool(fails)
    assert all(name in advice.reason for name in fails)


def test_sampled_answers_are_not_compared_letter_by_letter() -> None:
    for temperature in (0.7, None):
        advice = judge(temperature=temperature, candidate={i: OTHER for i in range(20)})
        assert (advice.go, advice.greedy) == (True, 0)
        assert next(c for c in advice.checks if c.name == "identical greedy answers").holds is None


def test_a_server_that_does_not_count_tokens_is_not_judged_by_them() -> None:
    advice = judge(candidate={0: {"tokens": None}})
    assert next(c for c in advice.checks if c.name == "mean length").holds is None
    assert advice.go


def test_a_latency_has_its_interval_and_differences_their_place() -> None:
    advice = judge(candidate={0: OTHER, 1: {"text": "abcdefgXij"}})
    assert next(c for c in advice.checks if c.name == "e2e P50").found == "0.90 (0.90 to 0.90)"
    assert [d.at for d in advice.differences] == [3, 7]
    assert advice.median_share == pytest.approx(0.5)
    assert advice.to_json()["identical"] == 18
