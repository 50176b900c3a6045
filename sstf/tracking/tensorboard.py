"""TensorBoard event files, in the run's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from sstf.errors import ConfigError
from sstf.tracking.base import TrackedRun


class TensorboardTracker:
    """Scalars in `<folder>/tensorboard`. Every start adds a file that tells TensorBoard to forget later steps."""

    def __init__(self, run: TrackedRun) -> None:
        """Open an event file.

        Raises:
            ConfigError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.trackers names tensorboard, which is not installed; run `pip install sstf[tensorboard]`"
            ) from None
        folder = run.folder / "tensorboard"
        known = folder.exists()
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=run.resume_step + 1)
        text = json.dumps(run.config, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```", run.resume_step)
        for step, figures in [] if known else run.history:
            self.log(step, figures)
        run.note(f"tensorboard: see it with `tensorboard --logdir {folder}`")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One scalar a figure, flushed: what was logged survives a kill."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files by name, which begins with the second of their start: two starts within one second would
    be read in the order of their process numbers, and the later be purged by the earlier."""
    newest = max((int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")), default=0)
    time.sleep(max(0.0, min(newest + 1 - time.time(), 1.0)))  # a file of another clock's future is not waited for
