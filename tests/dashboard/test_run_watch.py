from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sstf.dashboard.alarms import Alarms
from sstf.dashboard.runs import SILENT, RunWatch
from sstf.errors import ConfigError
from sstf.tracking import JsonlTracker


class Now:
    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


def figures(step: int) -> dict[str, float]:
    return {"train/loss/0": 10.0 / step, "train/loss/1": 12.0 / step, "lr": 0.001, "eta_seconds": 100.0 - step}


def training(run: Path, key: str = "abc") -> Path:
    folder = run / "train" / key
    folder.mkdir(parents=True)
    start = {
        "started": "2026-01-01T00:00:00+00:00",
        "target": {"name": "tiny"},
        "config": {"method": {"kind": "eagle3"}},
    }
    (folder / "run.json").write_text(json.dumps({"starts": [{}, start]}))
    return folder


def watch(folder: Path, now: Now | None = None, alarms: Alarms | None = None) -> RunWatch:
    run = RunWatch(folder, "run-0", alarms or Alarms(), now or Now())
    while run.poll():
        pass
    return run


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        RunWatch(tmp_path / "absent", "run-0", Alarms(), Now())
    with pytest.raises(ConfigError, match="holds no run: expected one of the folders data, extract, train"):
        RunWatch(tmp_path, "run-0", Alarms(), Now())


def test_a_log_grows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = watch(tmp_path)
    assert (run.state, run.step) == ("waiting", 0)
    folder = training(tmp_path)
    run.poll()
    assert run.state == "starting" and run.facts["target"] == "tiny" and run.facts["starts"] == 2
    log = JsonlTracker(folder / "metrics.jsonl", 0)
    log.log(10, figures(10))
    run.poll()
    before = run.version
    assert (run.state, run.step, run.latest["train/loss/0"]) == ("training", 10, 1.0)
    assert not run.poll() and run.version == before, "nothing new"
    log.log(20, figures(20))
    log.log(20, {"val/loss/0": 0.75})
    assert run.poll() and run.version == before + 1
    assert run.table.columns == ["train/loss/0", "train/loss/1", "lr", "eta_seconds", "val/loss/0"]
    assert run.table.rows() == [[10, 1.0, 1.2, 0.001, 90, None], [20, 0.5, 0.6, 0.001, 80, 0.75]]
    log.close()
    (folder / "done.json").write_text(json.dumps({"steps": 20, "planned_steps": 20, "accepted_length": 1.5}))
    run.poll()
    assert run.state == "finished" and run.facts["done"]["planned_steps"] == 20


def test_a_resumed_training_drops_what_it_repeats(tmp_path: Path) -> None:
    folder = training(tmp_path)
    log = JsonlTracker(folder / "metrics.jsonl", 0)
    for step in (10, 20, 30):
        log.log(step, figures(step))
    log.close()
    run = watch(tmp_path)
    assert [row[0] for row in run.table.rows()] == [10, 20, 30]
    table = run.table
    log = JsonlTracker(folder / "metrics.jsonl", 10)  # goes on from step 10
    log.log(15, figures(15))
    run.poll()
    assert [row[0] for row in run.table.rows()] == [10, 15]
    assert run.table is not table, "a page that follows gets all rows anew"
    log.close()


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    folder = training(tmp_path)
    lines: list[Any] = [
        json.dumps({"step": 1, "lr": 0.5}), '{"step": 2, "lr"', "[1, 2]", "null", "\x00\x01", '{"lr": 1}',
        '{"step": "x"}', '{"step": -1}', '{"step": 1e400}', "[" * 100_000, '{"step": 3, "lr": "text", "ok": true}',
        json.dumps({"step": 4, "lr": 0.25}),
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = watch(tmp_path)
    assert run.damaged == 9
    assert (run.step, run.latest) == (4, {"lr": 0.25})
    assert run.table.rows() == [[1, 0.5], [3, None], [4, 0.25]]


def test_what_is_not_finite_is_told(tmp_path: Path) -> None:
    folder = training(tmp_path)
    log = JsonlTracker(folder / "metrics.jsonl", 0)
    log.log(1, {"train/loss/0": 2.0})
    log.log(2, {"train/loss/0": math.nan})
    log.close()
    run = watch(tmp_path)
    assert run.damaged == 0 and run.not_finite == "train/loss/0 at step 2"
    assert run.latest == {"train/loss/0": None}
    json.dumps(run.to_json(), allow_nan=False)


def test_a_training_that_stands_still_is_silent(tmp_path: Path) -> None:
    folder, now = training(tmp_path), Now()
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    os.utime(path, (now.time, now.time))
    run = watch(tmp_path, now)
    now.time += SILENT - 1
    run.poll()
    assert run.state == "training"
    now.time += 2
    run.poll()
    assert run.state == "silent"


def test_the_newest_training_is_shown(tmp_path: Path) -> None:
    old, new = training(tmp_path, "old"), training(tmp_path, "new")
    (old / "metrics.jsonl").write_text('{"step": 7, "lr": 1}\n')
    for name in ("metrics.jsonl", "run.json"):
        os.utime(old / name, (2_000_000_000, 2_000_000_000))
    run = watch(tmp_path)
    assert (run.step, run.facts["key"]) == (7, "old")
    (new / "metrics.jsonl").write_text('{"step": 1, "lr": 2}\n')
    os.utime(new / "metrics.jsonl", (2_000_000_100, 2_000_000_100))
    run.poll()
    assert (run.step, run.facts["key"], run.latest) == (1, "new", {"lr": 2})
    assert watch(old).step == 7, "named by itself"


def test_rounds_on_rollouts_are_trainings(tmp_path: Path) -> None:
    folder = training(tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 7, "lr": 1}\n')
    run = watch(tmp_path)
    assert run.step == 7
    later = tmp_path / "on_policy" / "key" / "round-1"
    later.mkdir(parents=True)
    (later / "metrics.jsonl").write_text('{"step": 3, "lr": 1}\n')
    os.utime(later / "metrics.jsonl", (2_000_000_000, 2_000_000_000))
    run.poll()
    assert run.step == 3


def test_a_training_that_loses_acceptance_raises_an_alarm(tmp_path: Path) -> None:
    folder, alarms = training(tmp_path), Alarms()
    log = JsonlTracker(folder / "metrics.jsonl", 0)
    run = RunWatch(tmp_path, "run-0", alarms, Now())
    for step, value in ((100, 1.8), (200, 2.0), (300, 1.81)):
        log.log(step, {"val/simulated_accepted_length": value})
    run.poll()
    assert not alarms.active and run.best == (2.0, 200)
    log.log(400, {"val/simulated_accepted_length": 1.7})
    run.poll()
    [alarm] = alarms.active.values()
    assert alarm.text == "simulated accepted length 1.70 at step 400 fell from 2.00 at step 200"
    log.log(500, {"val/simulated_accepted_length": 1.9})
    run.poll()
    assert not alarms.active
    log.close()


def test_an_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "k"
    folder.mkdir(parents=True)
    row = {"arm": "chain", "temperature": 0.0, "category": "all", "accepted_length": 1.5, "speedup": math.nan}
    other = {"arm": "chain", "category": "code", "accepted_length": 1.4}
    (folder / "report.json").write_text(json.dumps({"schema": 1, "rows": [row, other, "x"]}))
    run = watch(tmp_path)
    assert run.state == "evaluated"
    [shown] = run.evaluation
    assert (shown["arm"], shown["accepted_length"], shown["speedup"], shown["void"]) == ("chain", 1.5, None, None)
    (folder / "report.json").write_text(json.dumps({"schema": 99, "results": []}))
    run.poll()
    assert run.evaluation == [] and "no rows" in run.note
    (folder / "report.json").write_text("{")
    run.poll()
