"""What a run says while it trains: figures for trackers, and for the person who watches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from sstf.data.progress import TrainingView
from sstf.machine import memory_in_use
from sstf.tracking import Tracker


class Report:
    """Figures under their names; closes the trackers when its context ends.

    Args:
        view: shows progress.
        trackers: of the main process; empty in the others.
        steps: of the whole run.
        done: of them, before this start.
        every: steps between lines of the log.
    """

    def __init__(self, view: TrainingView, trackers: Sequence[Tracker], steps: int, done: int, every: int) -> None:
        self.view, self.trackers, self.steps, self.first, self.every = view, trackers, steps, done, every
        self._started = time.perf_counter()
        self._tokens = 0
        self._waited = 0.0
        self._done = done

    def __enter__(self) -> Report:
        self.view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.__exit__(kind, error, trace)
        for tracker in self.trackers:
            tracker.close()

    def step(self, step: int, figures: dict[str, float], tokens: int, waited: float) -> None:
        """A step is done.

        Args:
            step: counted from 1.
            figures: of it.
            tokens: trained on since this start.
            waited: seconds without a batch since this start.
        """
        self._done, self._tokens, self._waited = step, tokens, waited
        self.view.step(step)
        if step == self.steps or step % self.every == 0:
            self.log(step, figures | self.pace())

    def log(self, step: int, figures: dict[str, float]) -> None:
        """To the view and all trackers."""
        self.view.figures(step, figures)
        for tracker in self.trackers:
            tracker.log(step, figures)

    def pace(self) -> dict[str, float]:
        """Speed since this start, and what is left."""
        seconds = time.perf_counter() - self._started
        steps = self._done - self.first
        return {
            "tokens_per_second": self._tokens / seconds,
            "waiting_share": self._waited / seconds,
            "eta_seconds": seconds / steps * (self.steps - self._done) if steps else 0.0,
            "memory_gib": memory_in_use() / 2**30,
        }
