"""The log that survives kills, and wandb without a network or a key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sstf.errors import ConfigError
from sstf.tracking import JsonlTracker, open_trackers


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_line(tmp_path: Path) -> None:
    (tracker,) = open_trackers((), "run", tmp_path, {}, resume_step=0)
    tracker.log(1, {"loss": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]  # on disk before it is closed
    tracker.close()


def test_a_resumed_log_drops_what_is_made_again_and_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "val": 1}\nnonsense\n[]\n{"st')
    tracker = JsonlTracker(path, resume_step=2)
    tracker.log(3, {})
    tracker.close()
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 2, "val": 1}, {"step": 3}]


def test_a_line_without_its_end_cannot_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # the kill came before the line break
    tracker = JsonlTracker(path, resume_step=2)
    tracker.log(2, {"again": 1.0})
    tracker.close()
    assert lines(path) == [{"step": 1}, {"step": 2, "again": 1.0}]


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed; run `pip install sstf\[wandb\]`"):
        open_trackers(("wandb",), "run", tmp_path, {}, 0)


@pytest.mark.parametrize(
    ("key", "mode", "expected"), [(None, None, "offline"), ("secret", None, None), (None, "disabled", None)]
)
def test_wandb_never_stops_to_ask_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str | None, expected: str | None
) -> None:
    started: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, float]]] = []
    run = SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: None)

    def init(**settings: Any) -> SimpleNamespace:
        started.update(settings)
        return run

    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return key is not None

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    for tracker in open_trackers(("wandb",), "my-run", tmp_path, {"a": 1}, 0):
        tracker.log(4, {"loss": 1.0})
        tracker.close()
    assert (started["mode"], started["name"], started["config"]) == (expected, "my-run", {"a": 1})
    assert logged == [(4, {"loss": 1.0})]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 1.0}]
