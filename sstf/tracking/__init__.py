"""Where training figures go: a JSONL file always, wandb when asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from sstf.errors import ConfigError

TrackerName = Literal["wandb"]


class Tracker(Protocol):
    """Takes named figures of a training step."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record `figures` at `step`."""

    def close(self) -> None:
        """Flush and end."""


class JsonlTracker:
    """One JSON object a line. Lines of steps that a resumed run will repeat are dropped when it is opened."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if _step(line) <= resume_step]
        scratch = path.with_name(f".{path.name}.tmp")  # replaced in one step: a kill here must not lose the log
        scratch.write_text("".join(kept), encoding="utf-8")
        scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One line, flushed: what was logged survives a kill."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbTracker:
    """Weights & Biases; offline where no key is configured, because it would otherwise stop and ask for one."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "train.trackers names wandb, which is not installed; run `pip install sstf[wandb]`"
            ) from None
        # WANDB_MODE, where it is set, decides; wandb reads it itself when mode is None.
        mode: Literal["offline"] | None = (
            None if os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False) else "offline"
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="sstf", name=name, dir=str(folder), config=config, mode=mode)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """To the run."""
        self._run.log(figures, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def open_trackers(
    names: Iterable[TrackerName], run_name: str, folder: Path, config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The JSONL tracker and those named."""
    # Those that can fail come first, so that no file is left open.
    named = [WandbTracker(run_name, folder, config) for name in names if name == "wandb"]
    return [JsonlTracker(folder / "metrics.jsonl", resume_step), *named]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    try:
        step = float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut by a kill
        return float("inf")
    return step if line.endswith("\n") else float("inf")
