"""Where training figures go: a JSONL file always; wandb, trackio and tensorboard when asked for.

All get the same names and steps. Where a run goes on after a stop, each goes on too: what lies behind the step it goes
on from is dropped, or kept and not logged twice.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from sstf.data.atomic import write_json_atomic
from sstf.tracking.base import TrackedRun, Tracker
from sstf.tracking.jsonl import JsonlTracker, read_rows
from sstf.tracking.tensorboard import TensorboardTracker
from sstf.tracking.trackio import TrackioTracker
from sstf.tracking.wandb import WandbTracker

__all__ = ["JsonlTracker", "TrackedRun", "Tracker", "TrackerName", "open_trackers"]

TrackerName = Literal["wandb", "trackio", "tensorboard"]
TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorboardTracker,
}


def open_trackers(
    names: Iterable[TrackerName],
    run_name: str,
    folder: Path,
    config: dict[str, Any],
    resume_step: int,
    note: Callable[[str], None] = warnings.warn,
) -> list[Tracker]:
    """The JSONL tracker, in `folder/metrics.jsonl`, and those named.

    Args:
        names: which others.
        run_name: what they call the run.
        folder: the training run's own.
        config: the effective configuration.
        resume_step: steps that are done, 0 in a new run.
        note: told in one sentence where figures are, and when a tracker fails: training goes on without it.

    Raises:
        ConfigError: a library is not installed, or did not start.
    """
    log = folder / "metrics.jsonl"
    named: list[Tracker] = []
    with ExitStack() as opened:  # where one cannot be opened, those before it are closed
        # The log comes last: it drops what will be repeated, and until then it tells what the others have.
        for name in dict.fromkeys(names):
            run = TrackedRun(run_name, _run_id(folder), folder, config, resume_step, read_rows(log), note)
            named.append(_Optional(name, TRACKERS[name](run), note))
            opened.callback(named[-1].close)
        trackers = [JsonlTracker(log, resume_step), *named]
        opened.pop_all()
    return trackers


class _Optional:
    """A tracker that training can do without: when it fails, it says so once and is left alone."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], None]) -> None:
        self._name, self._tracker, self._note, self._failed = name, tracker, note, False

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, figures))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # what these libraries may raise cannot be listed, and hours of training hang on it
            self._failed = True
            self._note(f"{self._name} failed and gets no more figures ({error!r}); metrics.jsonl has all of them")


def _run_id(folder: Path) -> str:
    """What trackers know the run in `folder` by, also when it goes on; made by the first start."""
    path = folder / "tracked.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):  # no other start has written it whole
        run_id = secrets.token_hex(4)
        write_json_atomic(path, {"id": run_id})
        return run_id
