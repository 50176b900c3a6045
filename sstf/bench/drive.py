"""Alternates between two servers: the same requests to each, in rounds, so that what else the machine does meets both.

A load is cut into rounds. In each, one server answers its requests, then the other the same ones; the order turns round
by round (A B, B A, ...). The servers never work at the same time, since on one machine each would slow the other. A
server that is gone ends the run, and what was measured until then is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sstf.bench.acceptance import Counters, read_counters
from sstf.bench.arrivals import Level
from sstf.bench.client import Answer, Server
from sstf.bench.requests import CHAT, Request
from sstf.bench.usage import Usage, Watch
from sstf.errors import ConfigError

WARM_UP = "Say hello."
WARM_UP_TOKENS = 8
UNSENT = "not sent"


@dataclass(frozen=True)
class Round:
    """One server's answers to the requests of one round, in their order, and the seconds that they took in all.

    `client_s` is the CPU time of this process meanwhile: close to `wall_s`, it is the client that is measured.
    """

    answers: list[Answer]
    wall_s: float
    client_s: float = 0.0


@dataclass
class Measured:
    """One server under one load."""

    rounds: list[Round] = field(default_factory=list)
    before: Counters | None = None  # of the engine
    after: Counters | None = None
    usage: Usage | None = None

    @property
    def answers(self) -> list[Answer]:
        """Of all rounds."""
        return [answer for each in self.rounds for answer in each.answers]

    @property
    def wall_s(self) -> float:
        """Seconds in which it was asked."""
        return sum(each.wall_s for each in self.rounds)

    @property
    def client_share(self) -> float:
        """Of a core, used by this process."""
        return sum(each.client_s for each in self.rounds) / self.wall_s if self.rounds else 0.0


@dataclass(frozen=True)
class Load:
    """Both servers under one load, and the requests that they got."""

    level: Level
    requests: list[Request]
    baseline: Measured
    candidate: Measured

    def aligned(self) -> tuple[list[Answer], list[Answer]]:
        """Both servers' answers in the order of the requests; one that was not sent has an error."""
        known = [{answer.request: answer for answer in side.answers} for side in (self.baseline, self.candidate)]
        first, second = (
            [answers.get(request.id, Answer(request.id, 0.0, error=UNSENT)) for request in self.requests]
            for answers in known
        )
        return first, second


@dataclass(frozen=True)
class Course:
    """All that was measured; `broken` says why it is not all that was to be measured."""

    loads: list[Load]
    broken: str | None


class _Gone(Exception):
    """A server does not answer any more."""


async def drive(
    baseline: Server,
    candidate: Server,
    levels: Sequence[Level],
    draw: Callable[[int], list[Request]],
    rounds: int,
    watches: tuple[Watch | None, Watch | None],
    note: Callable[[str], None],
) -> Course:
    """Go through the loads.

    Args:
        baseline: introduced.
        candidate: introduced.
        levels: the loads.
        draw: the requests of load i.
        rounds: of each load.
        watches: over the processes of both servers, where they are known.
        note: gets a line on what goes on.

    Raises:
        ConfigError: a server refuses its first request.
    """
    loads: list[Load] = []
    for number, level in enumerate(levels):
        load = Load(level, draw(number), Measured(), Measured())
        loads.append(load)
        sides = ((baseline, load.baseline, watches[0]), (candidate, load.candidate, watches[1]))
        try:
            for server, measured, watch in sides:
                await _warm_up(server, load, first=number == 0)
                measured.before = read_counters(await server.metrics())
                measured.usage = Usage() if watch else None
            for turn, (start, end) in enumerate(_cuts(len(load.requests), rounds)):
                note(f"{level.name}: requests {start + 1} to {end} of {len(load.requests)}")
                for server, measured, watch in sides if turn % 2 == 0 else sides[::-1]:
                    if watch and measured.usage:
                        watch.start()
                    try:
                        await _round(server, measured, level, load.requests, start, end)
                    finally:
                        if watch and measured.usage:
                            measured.usage = measured.usage.plus(watch.stop())
        except _Gone as gone:
            await _count(load, baseline, candidate)
            return Course(loads, str(gone))
        await _count(load, baseline, candidate)
    return Course(loads, None)


async def _count(load: Load, baseline: Server, candidate: Server) -> None:
    """What the engines have counted by the end of a load; nothing, of one that is gone."""
    for server, measured in ((baseline, load.baseline), (candidate, load.candidate)):
        measured.after = read_counters(await server.metrics())


def _cuts(count: int, rounds: int) -> list[tuple[int, int]]:
    """`count` requests in `rounds` parts that differ by one at most.

    >>> _cuts(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    edges = [count * i // rounds for i in range(rounds + 1)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


async def _warm_up(server: Server, load: Load, first: bool) -> None:
    """As many short answers at once as the load has users: engines prepare at the first use of a batch size."""
    body: dict[str, object] = {"max_tokens": WARM_UP_TOKENS, "temperature": 0}
    chat = load.requests[0].path == CHAT
    body |= {"messages": [{"role": "user", "content": WARM_UP}]} if chat else {"prompt": WARM_UP}
    request = Request("warm-up", load.requests[0].path, body)
    answers = await asyncio.gather(*(server.ask(request) for _ in range(load.level.concurrency or 1)))
    failed = next((answer for answer in answers if answer.error), None)
    if failed and first:
        raise ConfigError(f"{server.name} {server.url} failed its first request: {failed.error}")
    if failed and failed.lost and not await server.alive():
        raise _Gone(_gone(server, failed))


async def _round(
    server: Server, measured: Measured, level: Level, requests: Sequence[Request], start: int, end: int
) -> None:
    """One server's share of a round. What was answered is kept, also when the server goes away."""
    answers: dict[int, Answer] = {}
    began, used = time.perf_counter(), time.process_time()
    try:
        if level.due is None:
            await _closed(server, requests, range(start, end), level.concurrency or 1, answers)
        else:
            # The first round starts with the load, a later one with its own first request.
            offset = level.due[start] if start else 0.0
            due = {i: began + level.due[i] - offset for i in range(start, end)}
            await _open(server, requests, due, answers)
    finally:
        wall, client = time.perf_counter() - began, time.process_time() - used
        measured.rounds.append(Round([answers[i] for i in sorted(answers)], wall, client))
    failed = [answer for answer in answers.values() if answer.error]
    if failed and len(failed) == len(answers):
        raise _Gone(f"{server.name} {server.url} failed all {len(failed)} requests of a round ({failed[0].error})")


async def _closed(
    server: Server, requests: Sequence[Request], numbers: range, concurrency: int, answers: dict[int, Answer]
) -> None:
    waiting = iter(numbers)  # shared by the users

    async def user() -> None:
        for i in waiting:
            answers[i] = await _ask(server, requests[i], None)

    await _all([user() for _ in range(min(concurrency, len(numbers)))])


async def _open(server: Server, requests: Sequence[Request], due: dict[int, float], answers: dict[int, Answer]) -> None:
    async def send(i: int, at: float) -> None:
        await asyncio.sleep(at - time.perf_counter())
        answers[i] = await _ask(server, requests[i], at)

    await _all([send(i, at) for i, at in due.items()])


async def _all(works: Sequence[object]) -> None:
    """Run all; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]  # type: ignore[call-overload]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(server: Server, request: Request, due: float | None) -> Answer:
    answer = await server.ask(request, due)
    if answer.lost and not await server.alive():
        raise _Gone(_gone(server, answer))
    return answer


def _gone(server: Server, answer: Answer) -> str:
    return f"{server.name} {server.url} is gone: {answer.error}"
