"""What a tracker is, and what one is told about the run when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "sstf"
Logged = Set[tuple[int, str]]  # figures that a tracker has, as (step, name)


class Tracker(Protocol):
    """Takes named figures of a training step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record `figures` at `step`, counted from 1."""

    def close(self) -> None:
        """Flush and end."""


@dataclass(frozen=True)
class TrackedRun:
    """A training run as trackers know it.

    `id` is kept in the run's folder: a run that goes on after a stop is found under it again. `resume_step` is the
    last step that is done; later ones were lost or will be made once more, with the same figures. `rows` is what
    earlier starts logged, as (step, figures), later steps included.
    """

    name: str
    id: str
    folder: Path
    config: dict[str, Any]
    resume_step: int
    rows: list[tuple[int, dict[str, float]]]
    note: Callable[[str], None]  # one sentence to the person who watches

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """The rows that are valid still, in order. A tracker that lacks some of them - they were in no file yet when
        the process was killed, or it is a new one - gets them when it is opened."""
        return [(step, figures) for step, figures in self.rows if step <= self.resume_step]


def fresh(step: int, figures: Mapping[str, float], logged: Logged) -> dict[str, float]:
    """The figures that are not yet logged.

    >>> fresh(2, {"loss": 1.0, "val/loss": 2.0}, {(2, "loss")})
    {'val/loss': 2.0}
    """
    return {name: value for name, value in figures.items() if (step, name) not in logged}
