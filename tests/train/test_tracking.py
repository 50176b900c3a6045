"""Training figures in a file and in wandb."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import pytest
from tiny_store import train, train_config

from sstf.errors import ConfigError
from sstf.features import FeatureStore
from sstf.tracking import JsonlTracker, open_trackers


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_object_a_line_written_at_once(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "metrics.jsonl", 0)
    tracker.log(1, {"train/loss/0": 0.5})
    assert lines(tmp_path / "new" / "metrics.jsonl") == [{"step": 1, "train/loss/0": 0.5}]
    tracker.close()


def test_steps_that_are_repeated_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "a": 1}\n{"step": 10, "a": 2}\n{"step": 10, "val": 3}\n{"step": 11, "a": 4}\n')
    tracker = JsonlTracker(path, 10)
    tracker.log(11, {"a": 5})
    tracker.close()
    assert lines(path) == [
        {"step": 5, "a": 1},
        {"step": 10, "a": 2},
        {"step": 10, "val": 3},
        {"step": 11, "a": 5},
    ]


@pytest.mark.parametrize("rest", ['{"step": 6, "a"', '{"step": 6, "a": 1}', "6", "[]", '{"a": 1}\n', "\n"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "a": 1}\n' + rest)
    tracker = JsonlTracker(path, 5)
    tracker.log(6, {"a": 2})
    tracker.close()
    assert lines(path) == [{"step": 5, "a": 1}, {"step": 6, "a": 2}]


def test_wandb_without_a_key_works_offline(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra: pip install sstf[wandb]")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a key would lie
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        train(store, tmp_path / "run", train_config(steps=3, trackers=("wandb",)))
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 20
    while b"train/loss/0" not in record.read_bytes():  # wandb's own process writes it, at its leisure
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 3]


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed; run `pip install sstf\[wandb\]`"):
        open_trackers(["wandb"], "run", tmp_path, {}, 0)
