"""A run's folder: the log of its training as it grows, what it was started with, and its evaluation.

Names of the figures are the trackers' (docs/what-you-see.md). Read are `train/<key>/metrics.jsonl`, `run.json` and
`done.json`, and `eval/<key>/report.json`, of the newest key each; a folder of one training or one evaluation will do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sstf.dashboard.alarms import Alarms, Clock
from sstf.dashboard.tables import Curve
from sstf.dashboard.tail import Tail
from sstf.errors import ConfigError

STAGES = ("data", "extract", "train", "on_policy", "eval", "export")
TRAININGS = ("train/*/", "on_policy/*/round-*/")
SILENT = 300.0  # seconds; or three times the longest pause so far
FALLEN = 0.9  # of the best simulated accepted length
ACCEPTED = "val/simulated_accepted_length"
FACTS_BYTES = 1 << 22  # of run.json, done.json and a report; larger ones are not read
ROW_FIELDS = (
    "arm",
    "temperature",
    "prompts",
    "accepted_length",
    "accepted_length_ci",
    "acceptance_rate",
    "tokens_per_second",
    "speedup",
    "speedup_ci",
    "void",
)


class RunWatch:
    """One run. `poll` looks what is new; `version` counts what changed."""

    def __init__(self, folder: Path, ident: str, alarms: Alarms, clock: Clock) -> None:
        """Look what the folder is.

        Raises:
            ConfigError: it holds no run.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; name the folder of a run, such as runs/demo")
        self._alone = any((folder / name).exists() for name in ("metrics.jsonl", "run.json", "report.json"))
        if not self._alone and not any((folder / stage).is_dir() for stage in STAGES):
            raise ConfigError(f"{folder} holds no run: expected one of the folders {', '.join(STAGES)} in it")
        self.id, self.name, self.version, self.generation = ident, str(folder), 0, 0
        self._folder, self._alarms, self._clock = folder, alarms, clock
        self._training: Path | None = None
        self._tail: Tail | None = None
        self.state = "waiting"
        self._seen: dict[Path, tuple[int, int]] = {}
        self.facts: dict[str, Any] = {}
        self.evaluation: list[dict[str, Any]] = []
        self.note = ""
        self._forget()

    def _forget(self) -> None:
        """Begin with the log anew."""
        self.table = Curve(width=1)
        self.latest: dict[str, float | None] = {}
        self.step = self.damaged = 0
        self.best: tuple[float, int] | None = None
        self.not_finite = ""
        self._grew: float | None = None
        self._pause = 0.0
        self.generation += 1

    def poll(self) -> bool:
        """Read what is new; True when the log has more (a long one is read in several calls)."""
        training = self._newest(TRAININGS, "metrics.jsonl", "run.json")
        if training != self._training:
            self._training, self._tail, self.facts = training, None, {}
            self._forget()
            self.version += 1
        more = training is not None and self._read_log(training / "metrics.jsonl")
        if training:
            self._read_facts(training)
        evaluation = self._newest(("eval/*/",), "report.json")
        if evaluation and (report := self._changed(evaluation / "report.json")) is not None:
            self._read_report(report)
        state = self._state()
        if state != self.state:
            self.state = state
            self.version += 1
        return more

    def to_json(self) -> dict[str, Any]:
        """All but the table."""
        return {
            "id": self.id,
            "kind": "run",
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "latest": self.latest,
            "best": self.best,
            "facts": self.facts,
            "evaluation": self.evaluation,
            "damaged_lines": self.damaged,
            "not_finite": self.not_finite,
            "note": self.note,
        }

    def _newest(self, patterns: Sequence[str], *files: str) -> Path | None:
        """The folder of a stage that was written to last."""
        folders = [self._folder] if self._alone else [f for pattern in patterns for f in self._folder.glob(pattern)]
        found = [(time, f) for f in folders if (time := max(_modified(f / name) for name in files)) > 0]
        return max(found)[1] if found else None

    def _read_log(self, path: Path) -> bool:
        if self._tail is None:
            self._tail = Tail(path)
        growth = self._tail.poll()
        if growth.restarted:
            self._forget()
        for line in growth.lines:
            self._take(line)
        if growth.lines or growth.restarted:
            now = self._clock()
            if self._grew is not None:
                self._pause = max(self._pause, now - self._grew)
            self._grew = now
            self.version += 1
        return bool(growth.lines)

    def _take(self, line: bytes) -> None:
        """One line of the log; a damaged one is counted."""
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self.damaged += 1
            return
        figures = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if not isinstance(step, int) or not 0 <= step < 10**9:
            self.damaged += 1
            return
        self.step = step
        self.table.add(step, figures)
        for name, value in figures.items():
            if name in self.table.columns:
                self.latest[name] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                self.not_finite = f"{name} at step {step}"
        if math.isfinite(value := figures.get(ACCEPTED, math.nan)):
            self._compare(value, step)

    def _compare(self, value: float, step: int) -> None:
        """Of a training that loses what it had, the best is told beside it."""
        if self.best is None or value >= self.best[0]:
            self.best = (value, step)
        best, at = self.best
        if value < FALLEN * best:
            text = f"simulated accepted length {value:.2f} at step {step} fell from {best:.2f} at step {at}"
            self._alarms.raise_(self.name, "acceptance", text, self._clock())
        else:
            text = f"simulated accepted length is {value:.2f} again at step {step}"
            self._alarms.end(self.name, "acceptance", text, self._clock())

    def _read_facts(self, training: Path) -> None:
        if (run := self._changed(training / "run.json")) is not None:
            starts = run.get("starts")
            start = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
            self.facts |= {
                "started": _text(start.get("started")),
                "starts": len(starts) if isinstance(starts, list) else 0,
                "target": _text(_inner(start, "target", "name")),
                "method": _text(_inner(start, "config", "method", "kind")),
                "processes": _text(_inner(start, "launch", "processes")),
                "key": training.name,
            }
        if (done := self._changed(training / "done.json")) is not None:
            names = ("steps", "planned_steps", "accepted_length", "best_step", "tokens_per_second")
            self.facts["done"] = {
                n: v for n in names if isinstance(v := done.get(n), (int, float)) and math.isfinite(v)
            }

    def _read_report(self, report: dict[str, Any]) -> None:
        rows = report.get("rows")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        self.evaluation = [
            {name: _plain(row.get(name)) for name in ROW_FIELDS} for row in rows if row.get("category") in ("all", None)
        ][:50]
        self.note = "" if self.evaluation else "report.json has no rows that this version knows"

    def _changed(self, path: Path) -> dict[str, Any] | None:
        """The content of a small JSON file, once for each time it is written."""
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if self._seen.get(path) == stamp or found.st_size > FACTS_BYTES:
                return None
            content = json.loads(path.read_bytes())
            self._seen[path] = stamp
        except (OSError, ValueError, RecursionError):  # not there, or being written
            return None
        self.version += 1
        return content if isinstance(content, dict) else {}

    def _state(self) -> str:
        if self._training is None:
            return "evaluated" if self.evaluation else "waiting"
        if "done" in self.facts:
            return "finished"
        if not self.step:
            return "starting"
        still = self._clock() - _modified(self._training / "metrics.jsonl")
        return "silent" if still > max(SILENT, 3 * self._pause) else "training"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _inner(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _text(value: Any) -> str:
    return str(value)[:200] if isinstance(value, (str, int, float)) else ""


def _plain(value: Any) -> Any:
    """What may go to the page: text, finite numbers, and lists of them."""
    if isinstance(value, list):
        return [_plain(item) for item in value[:64]]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else _text(value) or None
