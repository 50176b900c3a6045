"""Every figure of a bench, from the answers. They are those of vLLM's `vllm bench serve`, so that both can be compared.

| name | of | what |
|---|---|---|
| `ttft` | a request | from when it was due to its first text |
| `itl` | a gap between events with text | a server that speculates sends several tokens at once: its gaps are longer |
| `tpot` | a request of 2 tokens or more | (`e2e` - `ttft`) / (tokens - 1): time per output token after the first |
| `e2e` | a request | from when it was due to its last text |
| `requests/s` | a load | whole answers / seconds in which the server was asked |
| `tokens/s` | a load | their tokens / the same seconds |
| `goodput` | a load | whole answers that meet every objective / the same seconds |

vLLM's differ in one place: it counts the first event, which may hold no text. Percentiles interpolate linearly, as
numpy's. Failed requests are in none of them. Intervals are 95 %, by bootstrap over requests: gaps of one answer stay
together, and so do the two servers' answers to one request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sstf.bench.client import Answer

Metric = Literal["ttft", "itl", "tpot", "e2e"]
METRICS: tuple[Metric, ...] = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = (50, 95, 99)
ROUNDS = 1000

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Values in seconds, rising, each with the number of its request."""

    values: Floats
    owners: Counts


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        """`[value, low, high]`."""
        return [self.value, self.low, self.high]


def tpot(answer: Answer) -> float | None:
    """Mean seconds a token after the first; None where there is none, or the server does not count."""
    if answer.error or answer.tokens is None or answer.tokens < 2:
        return None
    return (answer.e2e_s - answer.ttft_s) / (answer.tokens - 1)


def samples(answers: Sequence[Answer], metric: Metric) -> Samples:
    """The values of one metric, over requests 0 to len(answers) - 1."""
    pairs: list[tuple[float, int]] = []
    for number, answer in enumerate(answers):
        if answer.error:
            continue
        if metric == "itl":
            pairs += [(gap, number) for gap in answer.gaps_s]
        else:
            value = {"ttft": answer.ttft_s, "e2e": answer.e2e_s, "tpot": tpot(answer)}[metric]
            if value is not None:
                pairs.append((value, number))
    pairs.sort()
    return Samples(np.array([value for value, _ in pairs]), np.array([owner for _, owner in pairs], dtype=np.int64))


def draws(count: int, seed: int = 0) -> Counts:
    """How often each of `count` requests is drawn: `ROUNDS` samples of `count` with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=ROUNDS)


def percentiles(found: Samples, weights: Counts | None = None) -> Floats:
    """`PERCENTILES` of the values, each taken as often as its request was drawn; NaN for none.

    Equals `np.percentile` of the values so repeated, without repeating them.
    """
    taken = np.ones(len(found.values), dtype=np.int64) if weights is None else weights[found.owners]
    ends = np.cumsum(taken)
    if not len(ends) or ends[-1] == 0:
        return np.full(len(PERCENTILES), np.nan)
    places = np.array(PERCENTILES) / 100 * (ends[-1] - 1)
    below = found.values[np.searchsorted(ends, np.floor(places), side="right")]
    above = found.values[np.searchsorted(ends, np.ceil(places), side="right")]
    interpolated: Floats = below + (above - below) * (places - np.floor(places))
    return interpolated


def resampled(found: Samples, drawn: Counts) -> Floats:
    """Percentiles of every draw: [ROUNDS, len(PERCENTILES)]."""
    return np.array([percentiles(found, weights) for weights in drawn])


def interval(value: float, values: Floats) -> Interval | None:
    """The middle 95 % of resampled values; None where there is no figure."""
    values = values[np.isfinite(values)]
    if not np.isfinite(value) or not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class Latencies:
    """Percentiles of both servers in seconds, and the candidate's over the baseline's, in the order of PERCENTILES."""

    baseline: list[Interval | None]
    candidate: list[Interval | None]
    ratio: list[Interval | None]


def latencies(baseline: Sequence[Answer], candidate: Sequence[Answer], metric: Metric, drawn: Counts) -> Latencies:
    """One metric of both servers, whose answers i are to the same request."""
    values, drawn_values = [], []
    for answers in (baseline, candidate):
        found = samples(answers, metric)
        values.append(percentiles(found))
        drawn_values.append(resampled(found, drawn))
    with np.errstate(divide="ignore", invalid="ignore"):
        values.append(values[1] / values[0])
        drawn_values.append(drawn_values[1] / drawn_values[0])
    of = [
        [interval(value, columns[:, i]) for i, value in enumerate(row)]
        for row, columns in zip(values, drawn_values, strict=True)
    ]
    return Latencies(*of)


@dataclass(frozen=True)
class Throughput:
    """One server over one load. None: the server does not count tokens, or there is no objective."""

    requests: int
    failed: int
    wall_s: float
    requests_per_s: float
    tokens_per_s: float | None
    goodput: float | None
    good_share: float | None  # of all requests

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return dict(vars(self))


def throughput(answers: Sequence[Answer], wall_s: float, objective: Mapping[Metric, float]) -> Throughput:
    """Counts over seconds.

    Args:
        answers: failed ones included.
        wall_s: seconds in which the server was asked.
        objective: seconds that a request must keep to; see `is_good`.
    """
    whole = [answer for answer in answers if not answer.error]
    counts = [answer.tokens for answer in whole]
    tokens = None if None in counts else sum(count for count in counts if count is not None)
    good = sum(is_good(answer, objective) for answer in whole)
    seconds = wall_s or float("inf")
    return Throughput(
        requests=len(answers),
        failed=len(answers) - len(whole),
        wall_s=wall_s,
        requests_per_s=len(whole) / seconds,
        tokens_per_s=None if tokens is None else tokens / seconds,
        goodput=good / seconds if objective else None,
        good_share=good / len(answers) if objective and answers else None,
    )


def is_good(answer: Answer, objective: Mapping[Metric, float]) -> bool:
    """Whether a request keeps to every objective; for `itl`, with its longest gap. What it lacks is 0."""
    found: dict[Metric, float] = {
        "ttft": answer.ttft_s,
        "itl": max(answer.gaps_s, default=0.0),
        "tpot": tpot(answer) or 0.0,
        "e2e": answer.e2e_s,
    }
    return answer.error is None and all(found[metric] <= limit for metric, limit in objective.items())
