"""Progress on a terminal (bars) or in a log file (a line now and then)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.progress import Task as RichTask
from rich.text import Text

from sstf.data.progress import Progress, Task

LOG_EVERY_S = 15.0


class _Rate(ProgressColumn):
    """Units a second since the bar started."""

    def render(self, task: RichTask) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        return Text(f"{task.completed / elapsed:,.1f}/s" if elapsed else "")


class BarProgress:
    """Bars that live and die together on one display."""

    def __init__(self, console: Console) -> None:
        self._bars = RichBars(
            TextColumn("{task.description:>22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._running = 0

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """See `data.progress.Progress`."""
        if self._running == 0:
            for task in self._bars.task_ids:  # finished ones stay on the screen above, but are not redrawn
                self._bars.remove_task(task)
            self._bars.start()
        self._running += 1
        return _Bar(self, self._bars, self._bars.add_task(label, total=total, unit=unit))

    def end(self) -> None:
        """One bar less; the display stops with the last."""
        self._running -= 1
        if self._running == 0:
            self._bars.stop()


class _Bar:
    def __init__(self, owner: BarProgress, bars: RichBars, task: TaskID) -> None:
        self._owner, self._bars, self._task = owner, bars, task

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.end()

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)


class LogProgress:
    """A line at most every `LOG_EVERY_S` seconds a task: for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """See `data.progress.Progress`."""
        return _LogTask(self._console, label, total, unit)


class _LogTask:
    def __init__(self, console: Console, label: str, total: int | None, unit: str) -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._done = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print("done" if error is None else "stopped")

    def advance(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._last > LOG_EVERY_S:
            self._last = time.monotonic()
            self._print("")

    def _print(self, note: str) -> None:
        seconds = time.monotonic() - self._started
        total = f"/{self._total}" if self._total is not None else ""
        rate = f", {self._done / seconds:,.1f}/s" if seconds > 1 else ""
        self._console.print(
            f"{self._label}: {self._done}{total} {self._unit} {seconds:.0f} s{rate} {note}".rstrip(),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def display(console: Console) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return BarProgress(console) if console.is_terminal else LogProgress(console)
