"""TensorBoard event files, in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping

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
