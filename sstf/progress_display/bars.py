"""Bars on a terminal, and the live view of a training above them."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType

from rich.console import Console, RenderableType
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

from sstf.data.progress import Task, TrainingView
from sstf.progress_display.live import LiveTraining
from sstf.progress_display.training import TrainingState


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
        self._view: LiveTraining | None = None

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """See `data.progress.Progress`."""
        if self._running == 0:
            for task in self._bars.task_ids:  # finished ones stay on the screen above, but are not redrawn
                self._bars.remove_task(task)
            if self._view is None:  # else it draws them
                self._bars.start()
        self._running += 1
        return _Bar(self, self._bars, self._bars.add_task(label, total=total, unit=unit))

    def training(self, total: int, done: int = 0, best: float = 0.0, best_step: int = 0) -> TrainingView:
        """See `data.progress.Progress`."""
        state = TrainingState(total, done, best, best_step)
        self._view = LiveTraining(self._bars.console, state, self._running_bars, self._view_ended)
        return self._view

    def note(self, text: str) -> None:
        """See `data.progress.Progress`."""
        with suppress(OSError, SystemExit):  # a terminal that has gone must not end the work
            self._bars.console.print(Text(text, "yellow"), soft_wrap=True)

    def end(self) -> None:
        """One bar less; the display stops with the last."""
        self._running -= 1
        if self._running == 0:
            self._bars.stop()

    def _running_bars(self) -> RenderableType | None:
        return self._bars.get_renderable() if self._running else None

    def _view_ended(self) -> None:
        self._view = None


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
