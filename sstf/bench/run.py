"""A bench from its settings to its report."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sstf.bench.acceptance import read_counters
from sstf.bench.arrivals import Level, levels
from sstf.bench.client import Server, read_key
from sstf.bench.drive import Course, Load, drive
from sstf.bench.figures import Metric
from sstf.bench.mirror import COPIES_AT_ONCE, mirror
from sstf.bench.report import LoadFigures, Report, load_figures
from sstf.bench.requests import Request, from_suite, read_recorded, take
from sstf.bench.shadow import Limits, advise
from sstf.bench.usage import Watch, listening
from sstf.errors import ConfigError

REQUESTS = 32  # a load
CROWDED = 0.1  # share of the cores
CLIENT_BUSY = 0.5  # share of one core


@dataclass(frozen=True)
class Side:
    """One server. `pid`: of its process on this machine, None to look for who listens at the address."""

    url: str
    model: str | None = None
    key_env: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class BenchSettings:
    """What is sent, to whom, how fast. `shadow` is a recording, in place of a suite."""

    baseline: Side
    candidate: Side
    suite: str = "builtin"
    shadow: Path | None = None
    mirror: int | None = None  # a port, in place of a suite
    record: Path | None = None  # where mirrored requests are kept
    concurrency: tuple[int, ...] | None = None
    arrival: str = "closed"
    requests: int | None = None  # a load; None: 32, of a recording all
    max_tokens: int = 128
    temperature: float = 0.0
    objective: dict[Metric, float] | None = None  # seconds
    limits: Limits = field(default_factory=Limits)
    rounds: int = 4
    seed: int = 0
    timeout_s: float = 600.0


def bench(settings: BenchSettings, note: Callable[[str], None]) -> Report:
    """Measure both servers.

    Raises:
        ConfigError: a setting is wrong, or a server cannot be used from the start.
        DataError: the suite, recording or trace cannot be used.
    """
    keys = [read_key(side.key_env) for side in (settings.baseline, settings.candidate)]
    work, notes = _mirrored(settings, note) if settings.mirror is not None else _in_turns(settings, note)
    course, models, pids = asyncio.run(_measure(settings, keys, work))
    figures = [load_figures(load, settings.objective or {}) for load in course.loads if load.baseline.answers]
    advice = None
    if figures and (settings.shadow or settings.mirror is not None):
        load = course.loads[0]
        advice = advise(load.requests, *load.aligned(), figures[0].latencies, settings.limits, course.broken)
    about = {
        "started": _now(),
        "servers": _servers(settings, models, pids),
        "settings": _plain(settings),
        "notes": [*notes, *_crowd(figures), *_client(course.loads)],
    }
    return Report(about, figures, course.broken, advice)


Work = Callable[[Server, Server, tuple[Watch | None, Watch | None]], Awaitable[Course]]


async def _measure(settings: BenchSettings, keys: list[str], work: Work) -> tuple[Course, list[str], list[int | None]]:
    baseline, candidate = (
        Server(name, side.url, side.model, key, settings.timeout_s)
        for name, side, key in zip(
            ("baseline", "candidate"), (settings.baseline, settings.candidate), keys, strict=True
        )
    )
    async with baseline, candidate:
        await baseline.introduce()
        await candidate.introduce()
        pids = [side.pid or listening(side.url) for side in (settings.baseline, settings.candidate)]
        first, second = (None if pid is None else Watch(pid) for pid in pids)
        return await work(baseline, candidate, (first, second)), [baseline.model, candidate.model], pids


def _in_turns(settings: BenchSettings, note: Callable[[str], None]) -> tuple[Work, list[str]]:
    """A suite under every load, or a recording under one."""
    if settings.shadow:
        known = read_recorded(settings.shadow)
        count = min(settings.requests or len(known), len(known))
        loads = levels(settings.arrival, settings.concurrency, count, settings.seed)
        if len(loads) > 1:
            raise ConfigError(f"--shadow compares under one load, found {len(loads)}; give one concurrency or rate")
    else:
        count = settings.requests or REQUESTS
        loads = levels(settings.arrival, settings.concurrency, count, settings.seed)
        known = from_suite(settings.suite, count * len(loads), settings.max_tokens, settings.temperature)

    async def work(baseline: Server, candidate: Server, watches: tuple[Watch | None, Watch | None]) -> Course:
        # Each load goes on in the suite where the last one ended, so that prefix caches do not know its prompts yet.
        def draw(number: int) -> list[Request]:
            return take(known, number * count, count)

        return await drive(baseline, candidate, loads, draw, settings.rounds, watches, note)

    return work, _notes(count, loads, settings.rounds, len(known))


def _mirrored(settings: BenchSettings, note: Callable[[str], None]) -> tuple[Work, list[str]]:
    """Whatever clients ask for."""
    notes: list[str] = []

    async def work(baseline: Server, candidate: Server, watches: tuple[Watch | None, Watch | None]) -> Course:
        servers, before = (baseline, candidate), []
        for server, watch in zip(servers, watches, strict=True):
            before.append(read_counters(await server.metrics()))
            if watch:
                watch.start()
        try:
            seen = await mirror(*servers, settings.mirror or 0, settings.requests, settings.record, note)
        finally:
            usages = [watch.stop() if watch else None for watch in watches]
        load = seen.load()
        for server, side, counted, usage in zip(servers, (load.baseline, load.candidate), before, usages, strict=True):
            side.before, side.after, side.usage = counted, read_counters(await server.metrics()), usage
        notes.append("both servers worked at the same time: on one machine each slows the other")
        if seen.dropped:
            notes.append(f"{seen.dropped} requests were not mirrored, as the candidate had {COPIES_AT_ONCE} to answer")
        if seen.left:
            notes.append(f"{seen.left} requests are not compared, as their clients left")
        return Course([load], None if load.requests else "no request came to be mirrored")

    return work, notes


def _notes(count: int, loads: list[Level], rounds: int, known: int) -> list[str]:
    """What weakens the figures by the settings."""
    notes = []
    if count * len(loads) > known:
        notes.append(f"{count * len(loads)} requests of {known} prompts: repeats may come from prefix caches")
    if any(load.concurrency and load.concurrency > 1 and count < 2 * load.concurrency * rounds for load in loads):
        notes.append("rounds are short for their concurrency: as they end, fewer requests run at once")
    return notes


def _crowd(figures: list[LoadFigures]) -> list[str]:
    """Whether others used the machine."""
    spans = [side.usage for each in figures for side in (each.baseline, each.candidate) if side.usage]
    cores = max((span.others_cores for span in spans), default=0.0)
    total = os.cpu_count() or 1
    if cores <= CROWDED * total:
        return []
    return [f"other processes kept {cores:.1f} of {total} cores busy: these latencies are theirs as well"]


def _client(loads: list[Load]) -> list[str]:
    """Whether this process was a bottleneck: its events are read by one thread."""
    share = max((side.client_share for load in loads for side in (load.baseline, load.candidate)), default=0.0)
    if share <= CLIENT_BUSY:
        return []
    return [f"this client used {share:.2f} of a core, so that latencies are partly its own: lower the load"]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _servers(settings: BenchSettings, models: list[str], pids: list[int | None]) -> dict[str, Any]:
    sides = (settings.baseline, settings.candidate)
    return {
        name: {"url": side.url, "model": model, "pid": pid}
        for name, side, model, pid in zip(("baseline", "candidate"), sides, models, pids, strict=True)
    }


def _plain(settings: BenchSettings) -> dict[str, Any]:
    return {
        "suite": None if settings.shadow or settings.mirror is not None else settings.suite,
        "shadow": settings.shadow and str(settings.shadow),
        "mirror": settings.mirror,
        "concurrency": settings.concurrency,
        "arrival": settings.arrival,
        "requests": settings.requests,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "objective_s": settings.objective,
        "limits": settings.limits.model_dump(),
        "rounds": settings.rounds,
        "seed": settings.seed,
        "timeout_s": settings.timeout_s,
    }
