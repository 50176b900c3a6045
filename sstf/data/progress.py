"""How long stages report progress, without knowing who displays it."""

from __future__ import annotations

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


class Progress(Protocol):
    """Starts bars. A bar may be started while another one runs."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """A new bar; `total` is None when it is not known beforehand."""


class _NoTask:
    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def advance(self, n: int = 1) -> None:
        return None


class NoProgress:
    """Displays nothing."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """A bar that nobody sees."""
        return _NoTask()
