"""Trackio: wandb's interface over a local database that `trackio show` draws (https://huggingface.co/docs/trackio)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO

from sstf.errors import ConfigError
from sstf.tracking.base import PROJECT, TrackedRun, fresh


class TrackioTracker:
    """One run of trackio's project `sstf`, in trackio's own folder (TRACKIO_DIR moves it), over all starts of a
    training run. Figures that its database has are not logged again.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Start or resume the run.

        Raises:
            ConfigError: trackio is not installed, or did not start.
        """
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError:
            raise ConfigError(
                "train.trackers names trackio, which is not installed; run `pip install sstf[trackio]`"
            ) from None
        name = f"{run.name}-{run.id}"  # a run is found again by its name
        try:
            with redirect_stdout(StringIO()):  # the note below says what it would
                self._run = trackio.init(
                    project=PROJECT,
                    name=name,
                    config=run.config,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,  # the trainer logs what it needs
                    auto_log_cpu=False,
                )
            rows = SQLiteStorage.get_logs(PROJECT, name)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"train.trackers names trackio, which did not start ({error}); check TRACKIO_DIR, TRACKIO_SPACE_ID and "
                "TRACKIO_SERVER_URL"
            ) from None
        self._finish = trackio.finish  # not the run's: trackio would finish that once more when Python ends
        self._logged = {(int(row["step"]), figure) for row in rows for figure in row}
        for step, figures in run.history:
            self.log(step, figures)
        run.note(f"trackio: run {name}; see it with `trackio show --project {PROJECT}`")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """To the run's queue, which a thread empties twice a second."""
        if new := fresh(step, figures, self._logged):
            self._run.log(new, step=step)

    def close(self) -> None:
        """End the run."""
        with redirect_stdout(StringIO()):  # it speaks of an upload, where there is none
            self._finish()
