"""Whether traffic can change over from one server to another: the same requests to both, compared, and advice.

A greedy request has one right answer, and speculation must not change it. In float32 it does not; in half precision
two tokens may be so close that the order of additions decides, in every engine, and texts go apart from there. So the
share of identical answers has a limit that can be set, and every difference is shown with the text around it. For other
requests only the lengths are compared: with temperature, two runs of one server differ as well.

The advice is "go" when every check holds. Each compares a figure, as it is, with its limit; the interval beside it says
whether more requests could turn it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from sstf.bench.client import Answer
from sstf.bench.figures import PERCENTILES, Interval, Latencies, Metric, draws, interval
from sstf.bench.requests import Request
from sstf.config_loading import Section

AROUND = 40  # characters shown before and after the place where two texts go apart


class Limits(Section):
    """What the candidate has to keep to. Latencies are the candidate's over the baseline's."""

    requests: int = Field(default=20, ge=1)  # answered by both, at least
    errors: float = Field(default=0.01, ge=0, le=1)  # share of failed requests above the baseline's, at most
    identical: float = Field(default=0.9, ge=0, le=1)  # share of greedy answers, at least
    tokens: float = Field(default=0.1, ge=0)  # how far the mean length of an answer may be from the baseline's, at most
    ttft_p95: float = Field(default=1.2, gt=0)
    e2e_p50: float = Field(default=1.0, gt=0)
    e2e_p95: float = Field(default=1.1, gt=0)


@dataclass(frozen=True)
class Difference:
    """Two texts of one greedy request that go apart after `at` characters, with what stands around that place."""

    request: str
    at: int
    length: int  # characters of the baseline's text
    before: str
    baseline: str
    candidate: str


@dataclass(frozen=True)
class Check:
    """One rule. `holds` is None where there was nothing to judge."""

    name: str
    found: str
    limit: str
    holds: bool | None


@dataclass(frozen=True)
class Advice:
    """All checks, and the differences that were found."""

    checks: list[Check]
    compared: int
    greedy: int
    differences: list[Difference]

    @property
    def go(self) -> bool:
        """Whether no check fails."""
        return all(check.holds is not False for check in self.checks)

    @property
    def reason(self) -> str:
        """In one line."""
        failed = [f"{check.name} {check.found}, limit {check.limit}" for check in self.checks if check.holds is False]
        return "; ".join(failed) if failed else "every check holds"

    @property
    def median_share(self) -> float | None:
        """Of the baseline's text that stands before the first difference, in the median answer that differs."""
        shares = [d.at / d.length for d in self.differences if d.length]
        return median(shares) if shares else None

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "go": self.go,
            "reason": self.reason,
            "compared": self.compared,
            "greedy": self.greedy,
            "identical": self.greedy - len(self.differences),
            "median_share_before_difference": self.median_share,
            "checks": [vars(check) for check in self.checks],
            "differences": [vars(difference) for difference in self.differences],
        }


def first_difference(request: str, baseline: str, candidate: str) -> Difference | None:
    """Where two texts go apart; None for equal ones.

    >>> first_difference("1", "The answer is 42.", "The answer is 41.").at
    15
    """
    if baseline == candidate:
        return None
    pairs = enumerate(zip(baseline, candidate, strict=False))
    at = next((i for i, (old, new) in pairs if old != new), min(len(baseline), len(candidate)))
    ends = slice(at, at + AROUND)
    return Difference(request, at, len(baseline), baseline[max(0, at - AROUND) : at], baseline[ends], candidate[ends])


def advise(
    requests: Sequence[Request],
    baseline: Sequence[Answer],
    candidate: Sequence[Answer],
    found: dict[Metric, Latencies],
    limits: Limits,
    broken: str | None,
) -> Advice:
    """Judge.

    Args:
        requests: all of the load.
        baseline: its answer to each.
        candidate: its answer to each.
        found: the load's latencies.
        limits: to keep to.
        broken: why the run ended early, if it did.
    """
    both = [
        (request, old, new)
        for request, old, new in zip(requests, baseline, candidate, strict=True)
        if not old.error and not new.error
    ]
    greedy = [(old, new) for request, old, new in both if request.greedy]
    differences = [d for old, new in greedy if (d := first_difference(old.request, old.text, new.text))]
    excess = _failed(candidate) - _failed(baseline)
    checks = [
        Check("compared requests", f"{len(both)}", f"at least {limits.requests}", len(both) >= limits.requests),
        Check("failures above baseline", f"{excess:+.1%}", f"at most {limits.errors:.1%}", excess <= limits.errors),
        _identical(len(greedy), len(differences), limits.identical),
        _length([(old.tokens, new.tokens) for _, old, new in both], limits.tokens),
        _latency("ttft", 95, found, limits.ttft_p95),
        _latency("e2e", 50, found, limits.e2e_p50),
        _latency("e2e", 95, found, limits.e2e_p95),
    ]
    if broken:
        checks.insert(0, Check("both servers", broken, "up to the end", False))
    return Advice(checks, len(both), len(greedy), differences)


def _failed(answers: Sequence[Answer]) -> float:
    return sum(answer.error is not None for answer in answers) / len(answers)


def _identical(greedy: int, different: int, limit: float) -> Check:
    name, least = "identical greedy answers", f"at least {limit:.0%}"
    if not greedy:
        return Check(name, "no request with temperature 0", least, None)
    share = 1 - different / greedy
    return Check(name, f"{share:.0%} ({greedy - different} of {greedy})", least, share >= limit)


def _length(counts: Sequence[tuple[int | None, int | None]], limit: float) -> Check:
    name, bounds = "mean length", f"{max(0.0, 1 - limit):.2f} to {1 + limit:.2f} of the baseline's"
    pairs = [(old, new) for old, new in counts if old is not None and new is not None]
    if not pairs or len(pairs) < len(counts) or not any(old for old, _ in pairs):
        return Check(name, "a server does not count tokens", bounds, None)
    tokens = np.array(pairs, dtype=float)
    drawn = draws(len(pairs)) @ tokens
    sums = tokens.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = interval(sums[1] / sums[0], drawn[:, 1] / drawn[:, 0])
    assert ratio is not None
    return Check(name, _with_interval(ratio), bounds, 1 - limit <= ratio.value <= 1 + limit)


def _latency(metric: Metric, percentile: int, found: dict[Metric, Latencies], limit: float) -> Check:
    name, most = f"{metric} P{percentile}", f"at most {limit:g} of the baseline's"
    ratio = found[metric].ratio[PERCENTILES.index(percentile)]
    if ratio is None:
        return Check(name, "nothing measured", most, None)
    return Check(name, _with_interval(ratio), most, ratio.value <= limit)


def _with_interval(ratio: Interval) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
