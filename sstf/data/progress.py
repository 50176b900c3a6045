"""How long stages report progress, without knowing who displays it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One running bar; leaving the context ends it."""

    def __enter__(self) -> Task: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""


class TrainingView(Protocol):
    """What is seen of a training while it runs; leaving the context ends it. It never fails."""

    def __enter__(self) -> TrainingView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, done: int) -> None:
        """So many optimiser steps are done, of the whole run. Cheap: call it after every step."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """What trackers are given, under the same names. `prefix/name/<i>` is a row of a table, by position i."""


class Progress(Protocol):
    """Starts bars. A bar may be started while another one runs, or a training view."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """A new bar; `total` is None when it is not known beforehand."""

    def training(self, total: int, done: int = 0, best: float = 0.0, best_step: int = 0) -> TrainingView:
        """A view of a training of `total` steps, `done` of them by earlier starts, which reached a simulated accepted
        length of `best` at `best_step` (0: none was measured)."""

    def note(self, text: str) -> None:
        """Something that the user should know while the work goes on, in one sentence."""


class _NoTask:
    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def advance(self, n: int = 1) -> None:
        return None


class _NoView:
    def __enter__(self) -> TrainingView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def step(self, done: int) -> None:
        return None

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        return None


class NoProgress:
    """Displays nothing."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """A bar that nobody sees."""
        return _NoTask()

    def training(self, total: int, done: int = 0, best: float = 0.0, best_step: int = 0) -> TrainingView:
        """A view that nobody sees."""
        return _NoView()

    def note(self, text: str) -> None:
        """A note that nobody reads."""
