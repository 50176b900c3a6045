"""All that is watched, the loop that asks it, and what a page that listens has not heard yet."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from sstf.dashboard.alarms import Alarms, Band, Clock
from sstf.dashboard.engines import EngineWatch
from sstf.dashboard.machine_use import MachineWatch
from sstf.dashboard.runs import RunWatch
from sstf.dashboard.tables import WINDOWS, Table
from sstf.errors import ConfigError

INTERVAL = 2.0  # seconds between two looks at anything


class Board:
    """Runs, engines and this machine."""

    def __init__(
        self,
        runs: Sequence[Path],
        engines: Sequence[str],
        band: Band | None = None,
        interval: float = INTERVAL,
        clock: Clock = time.time,
    ) -> None:
        """Look once at the folders and addresses.

        Args:
            runs: folders of runs.
            engines: `URL` or `NAME=URL`; the first is the baseline that others are compared with.
            band: accepted lengths of the engines that raise no alarm; None learns one for each.
            interval: seconds between two looks.
            clock: seconds since 1970.

        Raises:
            ConfigError: nothing to watch, a folder without a run, an address that is none.
        """
        if not runs and not engines:
            raise ConfigError(
                "nothing to watch: name a run's folder, an engine (--engine http://HOST:PORT), or several"
            )
        self.alarms = Alarms()
        self.runs = [RunWatch(folder, f"run-{i}", self.alarms, clock) for i, folder in enumerate(runs)]
        self.engines = [EngineWatch(text, f"engine-{i}", self.alarms, clock, band) for i, text in enumerate(engines)]
        names = [watch.name for watch in self.engines]
        if len(set(names)) < len(names):
            raise ConfigError("two engines have one name; name them apart: --engine NAME=URL")
        self.machine = MachineWatch(clock)
        self.interval = interval

    async def watch(self) -> None:
        """Ask everything again and again, until cancelled."""
        # Not the proxies of the environment: an engine is asked where it is.
        async with httpx.AsyncClient(trust_env=False) as client:
            await asyncio.gather(self._files(), *(self._engine(engine, client) for engine in self.engines))

    async def _files(self) -> None:
        while True:
            for run in self.runs:
                while run.poll():
                    await asyncio.sleep(0)
            self.machine.poll()
            await asyncio.sleep(self.interval)

    async def _engine(self, engine: EngineWatch, client: httpx.AsyncClient) -> None:
        while True:
            await engine.poll(client)
            await asyncio.sleep(max(self.interval, engine.patience))


class Follower:
    """One page that listens: remembers what it was told."""

    def __init__(self, board: Board, window: int) -> None:
        """`window` is one of `WINDOWS`, in seconds."""
        self._board, self._window = board, window
        self._told: dict[str, int] = {}
        self._tables: dict[str, Told] = {}
        self._alarms = -1

    def news(self) -> dict[str, Any] | None:
        """What changed since the last call; all at the first, None when nothing did."""
        board = self._board
        sources: list[dict[str, Any]] = []
        watched: list[RunWatch | EngineWatch | MachineWatch] = [*board.runs, *board.engines, board.machine]
        for source in watched:
            if self._told.get(source.id) == source.version:
                continue
            self._told[source.id] = source.version
            if isinstance(source, RunWatch):
                table: Table = source.table
            else:
                table = source.history.windows[self._window]
            sources.append(source.to_json() | {"table": self._tables.setdefault(source.id, Told()).news(table)})
        first, raised = self._alarms < 0, board.alarms.raised
        if not sources and raised == self._alarms:
            return None
        new = [] if first else board.alarms.since(self._alarms)
        self._alarms = raised
        return {
            "window": self._window,
            "sources": sources,
            "alarms": [asdict(alarm) for alarm in board.alarms.active.values()],
            "log": [asdict(alarm) for alarm in board.alarms.log],
            "new_alarms": new,
        }


class Told:
    """What a page has of a table. Only the newest row changes, unless the width does, or the table is another one."""

    def __init__(self) -> None:
        self._table: Table | None = None
        self._width = self._last = math.nan

    def news(self, table: Table) -> dict[str, Any]:
        """Rows that the page lacks. `since` None: all, in place of what it has; otherwise in place of those from
        there on, and it drops those before `first`."""
        whole = self._table is not table or self._width != table.width or math.isnan(self._last)
        since = -math.inf if whole else self._last
        self._table, self._width = table, table.width
        self._last = math.nan if table.last is None else table.last
        return {
            "columns": table.columns,
            "width": table.width,
            "since": None if whole else since,
            "first": table.first,
            "rows": table.rows(since),
        }


def known_window(seconds: int) -> int:
    """`seconds` if it is a window, otherwise the shortest."""
    return seconds if seconds in WINDOWS else min(WINDOWS)
