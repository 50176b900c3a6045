"""The log that survives kills, and what happens where a library is missing, has no key or fails (the real ones are in
`test_real_trackers`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sstf.errors import ConfigError
from sstf.tracking import JsonlTracker, TrackerName, open_trackers


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


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed; run `pip install sstf\[{name}\]`"):
        open_trackers((name,), "run", tmp_path, {}, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "mode", "expected"), [(None, None, "offline"), ("secret", None, None), (None, "disabled", "disabled")]
)
def test_wandb_never_stops_to_ask_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str | None, expected: str | None
) -> None:
    started: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, float]]] = []
    notes: list[str] = []
    run = SimpleNamespace(
        log=lambda figures, step: logged.append((step, figures)),
        finish=lambda: None,
        url="https://wandb.example/run",
        offline=False,
        step=3,
    )

    def init(**settings: Any) -> SimpleNamespace:
        started.update(settings)
        return run

    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return key is not None

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, init=init, Settings=dict, Error=OSError))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    for tracker in open_trackers(("wandb",), "my-run", tmp_path, {"a": 1}, 2, notes.append):
        tracker.log(2, {"loss": 2.0})  # the run has it
        tracker.log(4, {"loss": 1.0})
        tracker.close()
    assert (started["mode"], started["name"], started["config"]) == (expected, "my-run", {"a": 1})
    assert logged == [(4, {"loss": 1.0})]
    assert notes == ([] if mode else [f"wandb: run {started['id']} at https://wandb.example/run"])
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.0}]


def test_wandb_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("no such host\nand a page of details")

    module = SimpleNamespace(login=lambda **options: True, init=init, Settings=dict, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"did not start \(no such host\); check its key and the network"):
        open_trackers(("wandb",), "run", tmp_path, {}, 0)


def test_a_tracker_that_fails_is_left_alone_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def log(figures: dict[str, float], step: int) -> None:
        calls.append(step)
        raise BrokenPipeError("service is gone")

    run = SimpleNamespace(log=log, finish=lambda: calls.append(-1), url=None, offline=True)
    module = SimpleNamespace(login=lambda **o: False, init=lambda **o: run, Settings=dict, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    notes: list[str] = []
    trackers = open_trackers(("wandb",), "run", tmp_path, {}, 0, notes.append)
    for step in (1, 2):
        for tracker in trackers:
            tracker.log(step, {"loss": 1.0})
    for tracker in trackers:
        tracker.close()
    assert calls == [1]
    assert "wandb failed and gets no more figures (BrokenPipeError('service is gone'))" in notes[-1]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
