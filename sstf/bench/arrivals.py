"""When requests are sent.

Closed: so many users, each of whom sends its next request when its last one is answered. A slow server is asked less,
so its latencies look better than what users see who do not wait for one another ("coordinated omission"). Open:
requests come at times of their own, by a Poisson process or as recorded, whatever the server does; latency is then
counted from the time at which a request was due.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sstf.bench.requests import json_lines
from sstf.errors import ConfigError, DataError


@dataclass(frozen=True)
class Level:
    """One load. Either `concurrency` users, or `due`: seconds from the start at which request i is sent."""

    name: str
    concurrency: int | None = None
    due: tuple[float, ...] | None = None


def levels(arrival: str, concurrency: Sequence[int] | None, requests: int, seed: int) -> list[Level]:
    """The loads to go through.

    Args:
        arrival: `closed`, `poisson:RATE[,RATE...]` in requests a second, or `trace:FILE`.
        concurrency: of closed arrival, one load each; None is 1.
        requests: a load; a trace must be as long.
        seed: of the Poisson process; both servers get the same times.

    Raises:
        ConfigError: the arrival is none of these, or contradicts `concurrency`.
        DataError: the trace cannot be used.
    """
    if arrival == "closed":
        return [Level(f"concurrency {users}", concurrency=users) for users in concurrency or [1]]
    if concurrency is not None:
        raise ConfigError("--concurrency is for closed arrival; in open arrival, requests do not wait for one another")
    kind, _, value = arrival.partition(":")
    if kind == "poisson":
        return [
            Level(f"poisson {rate:g}/s", due=poisson(rate, requests, seed)) for rate in map(_rate, value.split(","))
        ]
    if kind == "trace" and value:
        due = read_trace(Path(value))
        if len(due) < requests:
            raise ConfigError(f"{value} has {len(due)} arrivals, expected at least --requests {requests}")
        return [Level(f"trace {Path(value).name}", due=due[:requests])]
    raise ConfigError(f"--arrival {arrival}: expected closed, poisson:RATE or trace:FILE")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(f"--arrival poisson:{text}: expected requests a second above 0")
    return rate


def poisson(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """Seconds of the first `count` arrivals of a Poisson process: gaps are exponential, with mean 1 / rate."""
    draws = random.Random(seed)
    due, now = [], 0.0
    for _ in range(count):
        now += draws.expovariate(rate)
        due.append(now)
    return tuple(due)


def read_trace(path: Path) -> tuple[float, ...]:
    """Arrivals in seconds, one a line: a number, or an object with `at`, such as a recorded request.

    Raises:
        DataError: a line holds neither, times fall, or there is none.
    """
    due: list[float] = []
    for number, row in json_lines(path):
        at = row.get("at") if isinstance(row, dict) else row
        if not isinstance(at, (int, float)) or isinstance(at, bool) or not 0 <= at < 1e9:
            raise DataError(f"{path}:{number}: expected seconds, or an object with `at` in seconds")
        if due and at < due[-1]:
            raise DataError(f"{path}:{number}: {at:g} s comes after {due[-1]:g} s; expected rising times")
        due.append(float(at))
    if not due:
        raise DataError(f"{path} holds no arrival; expected seconds, one a line")
    return tuple(at - due[0] for at in due)
