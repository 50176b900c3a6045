"""Weights & Biases: https://docs.wandb.ai."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sstf.errors import ConfigError
from sstf.tracking.base import PROJECT, TrackedRun, fresh


class WandbTracker:
    """One wandb run over all starts of a training run; offline where no key is configured, because wandb would
    otherwise stop and ask for one.

    A wandb run cannot take figures back, so those it has are not logged again. Online, it tells its last step.
    Offline, every start leaves a folder of its own under the same run id, and `wandb sync` joins them; they are taken
    to have what metrics.jsonl has, though a kill can cost them the last second.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Start or resume the run.

        Raises:
            ConfigError: wandb is not installed, or did not start.
        """
        # It must not send reports of its own errors anywhere; it reads this when it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "train.trackers names wandb, which is not installed; run `pip install sstf[wandb]`"
            ) from None
        # Not left to wandb, which reads the environment only once in a Python process.
        mode: Any = os.environ.get("WANDB_MODE") or (None if wandb.login(prompt=False, verify=False) else "offline")
        run.folder.mkdir(parents=True, exist_ok=True)
        known = any((run.folder / "wandb").glob(f"offline-run-*-{run.id}"))
        settings = wandb.Settings(
            silent=True,  # the terminal is the live view's
            console="off",
            # run.json has these, without the secrets that a command line may hold and the name of the host.
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            x_disable_stats=True,
            x_transaction_log_flush_interval=0.5,  # seconds; a kill loses what is not yet in the file
        )
        try:
            self._run = wandb.init(
                project=PROJECT,
                name=run.name,
                id=run.id,
                resume="allow",
                dir=str(run.folder),
                config=run.config,
                mode=mode,
                settings=settings,
            )
        except (wandb.Error, ValueError) as error:  # ValueError: a mode that does not exist
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"train.trackers names wandb, which did not start ({first_line}); check its key and the network, or "
                "set WANDB_MODE=offline"
            ) from None
        rows = run.rows if self._run.offline and known else []
        self._logged = {(step, figure) for step, figures in rows for figure in figures}
        self._next_step = 0 if self._run.offline else self._run.step
        for step, figures in run.history:
            self.log(step, figures)
        if mode == "disabled":
            return
        where = f"at {self._run.url}" if self._run.url else f"in {run.folder / 'wandb'}; `wandb sync` sends it"
        run.note(f"wandb: run {run.id} {where}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """To the run."""
        new = fresh(step, figures, self._logged)
        if new and step >= self._next_step:
            self._run.log(new, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
