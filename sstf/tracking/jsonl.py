"""The log that every run has: one JSON object a line, beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sstf.data.atomic import write_bytes_atomic


class JsonlTracker:
    """Lines of steps that a resumed run will repeat are dropped when it is opened, and so is a line cut by a kill."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line, step, _ in _rows(path) if step <= resume_step]
        # Replaced in one step: a kill here must not lose the log.
        write_bytes_atomic(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One line, flushed: what was logged survives a kill."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of every whole line of the log at `path`."""
    return [(int(step), {k: v for k, v in row.items() if k != "step"}) for _, step, row in _rows(path)]


def _rows(path: Path) -> list[tuple[str, float, dict[str, Any]]]:
    """Whole lines, with their step and content."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            content = json.loads(line)
            step = float(content["step"])
        except (ValueError, KeyError, TypeError):  # cut by a kill
            continue
        if line.endswith("\n"):
            rows.append((line, step, content))
    return rows
