"""A line now and then: for files, pipes and terminals that cannot redraw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.text import Text

from sstf.data.progress import Task, TrainingView
from sstf.progress_display.training import TrainingState, duration, pieces, table

LOG_EVERY_S = 15.0


class LogProgress:
    """A line at most every `LOG_EVERY_S` seconds a task: for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """See `data.progress.Progress`."""
        return _LogTask(self._console, label, total, unit)

    def training(self, total: int, done: int = 0, best: float = 0.0, best_step: int = 0) -> TrainingView:
        """See `data.progress.Progress`."""
        return TrainingLines(self._console, TrainingState(total, done, best, best_step))

    def note(self, text: str) -> None:
        """See `data.progress.Progress`."""
        _write(self._console, text)


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
        _write(self._console, f"{self._label}: {self._done}{total} {self._unit} {seconds:.0f} s{rate} {note}".rstrip())


class TrainingLines:
    """A line for each set of figures."""

    def __init__(self, console: Console, state: TrainingState) -> None:
        self._console, self._state = console, state

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = "done" if error is None else "stopped"
        _write(self._console, f"training {end} at step {self._state.done} after {duration(self._state.elapsed)}")

    def step(self, done: int) -> None:
        """See `data.progress.TrainingView`."""
        self._state.step(done)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `data.progress.TrainingView`."""
        state = self._state
        state.add(step, figures)
        rows = [f"{name} {' '.join(values)}" for name, values in table(figures, 3)]
        left = [f"{duration(state.left)} left"] if state.left is not None else []
        _write(self._console, f"step {step}/{state.total}: {', '.join(rows + pieces(state, figures) + left)}")


def _write(console: Console, text: str) -> None:
    # Whoever read these lines may have gone, on which rich leaves the program; the work goes on.
    with suppress(OSError, SystemExit):
        console.print(Text(text), soft_wrap=True)
