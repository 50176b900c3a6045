"""The accepted length to expect, from a table of runs that were made: `known_runs.json`, ours and published ones.

Comparable is a run of the same method that drafts in the same shape (chains or trees), for a target of a similar size
(within a factor of 4), on a similar amount of data (within a factor of 10 in tokens). Between their amounts of data
the estimate is interpolated in the logarithm of the tokens; beyond them it stays at the nearest. Runs differ in target,
prompts, temperature and depth, so what is printed is the spread of the runs used, and nothing finer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby, pairwise
from statistics import median
from typing import Any, Literal

Shape = Literal["chain", "tree"]
Tier = Literal["smoke", "dev", "prod"]

SIZE_FACTOR = 4.0
DATA_FACTOR = 10.0
# Tokens from which the known runs reach the next level: below the first, heads accept some words and gain little;
# from the second on, they are what is served.
TIERS: dict[Tier, float] = {"smoke": 0, "dev": 3e6, "prod": 1e8}


@dataclass(frozen=True)
class KnownRun:
    """One measured accepted length. `tokens` is None where the source gives conversations only."""

    target: str
    parameters: int
    method: str
    conversations: int
    tokens: int | None
    shape: Shape
    depth: int | None
    temperature: float | None
    suite: str
    accepted_length: float
    origin: Literal["ours", "reported", "published"]
    source: str


@dataclass(frozen=True)
class Expectation:
    """An accepted length: interpolated, and the least and most that the runs behind it reached."""

    shape: Shape
    value: float
    low: float
    high: float
    runs: int
    targets: tuple[str, ...]
    outside: bool  # less than half the data of any of the runs, or more than twice


@cache
def known_runs() -> tuple[KnownRun, ...]:
    """The table."""
    return tuple(KnownRun(**row) for row in _table()["runs"])


def tokens_of(run: KnownRun) -> float:
    """Tokens that it was trained on, estimated from its conversations where they are not known."""
    return float(run.tokens or run.conversations * _table()["tokens_per_conversation"])


def expected(runs: Sequence[KnownRun], method: str, shape: Shape, parameters: int, tokens: float) -> Expectation | None:
    """What comparable runs reached; None if there is none."""
    used = [
        run
        for run in runs
        if (run.method, run.shape) == (method, shape)
        and _within(run.parameters, parameters, SIZE_FACTOR)
        and _within(tokens_of(run), tokens, DATA_FACTOR)
    ]
    if not used:
        return None
    ordered = sorted(used, key=tokens_of)
    points = [(t, median(run.accepted_length for run in some)) for t, some in groupby(ordered, tokens_of)]
    lengths = [run.accepted_length for run in used]
    return Expectation(
        shape,
        _interpolate(points, tokens),
        min(lengths),
        max(lengths),
        len(used),
        tuple(dict.fromkeys(run.target for run in used)),
        not points[0][0] / 2 <= tokens <= points[-1][0] * 2,
    )


def tier_of(tokens: float) -> Tier:
    """The tier of an amount of data."""
    return [tier for tier, least in TIERS.items() if tokens >= least][-1]


def reached(runs: Sequence[KnownRun], tier: Tier) -> tuple[float, float]:
    """The least and most accepted length of the runs in a tier, whatever their target."""
    lengths = [run.accepted_length for run in runs if tier_of(tokens_of(run)) == tier]
    return min(lengths), max(lengths)


def _within(one: float, other: float, factor: float) -> bool:
    return max(one, other) <= factor * min(one, other)


def _interpolate(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Straight lines between `points` over the logarithm of their first figure, ascending; flat beyond them."""
    if tokens <= points[0][0]:
        return points[0][1]
    for (left, below), (right, above) in pairwise(points):
        if tokens <= right:
            share = math.log(tokens / left) / math.log(right / left)
            return below + share * (above - below)
    return points[-1][1]


@cache
def _table() -> dict[str, Any]:
    text = resources.files("sstf.planning").joinpath("known_runs.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
