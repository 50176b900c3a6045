"""`kill -9` in every stage, the same command again, and the result is that of a run that nobody disturbed.

The processes are real and so is the signal. One chain of starts goes through all stages, because most of a start is
imports: each start is killed at the next point, the last one runs to the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pipeline_runs import base_config, merge, open_run, write_conversations, write_suite

from sstf.pipeline import Run

TIMEOUT_S = 120.0
# Each stage lasts about a second or more on one core, which a poll every millisecond cannot miss.
LONGER = {
    "data.answers.max_new_tokens": 40,
    "train.precision": "bf16",
    "train.steps": 45,
    "train.checkpoint_every": 5,
    "train.validate_every": 15,
    "eval.repeats": 12,
}


@dataclass(frozen=True)
class Point:
    """Where a start is killed: as soon as `reached`, which must be before `over`."""

    stage: str
    reached: Callable[[Path], bool]  # of the stage's folder; for data, of what was generated
    over: Callable[[Path], bool]


def exists(name: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / name).exists()


def checkpoints(at_least: int) -> Callable[[Path], bool]:
    def reached(folder: Path) -> bool:
        steps = [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]
        return bool(steps) and max(steps) >= at_least

    return reached


POINTS = [
    Point("data", exists("answers-00000.jsonl"), exists("tokens.json")),
    Point("extract", exists("shard-00000.json"), exists("manifest.json")),
    # Between two checkpoints, so that steps and log lines are lost and made again.
    Point("train", lambda folder: checkpoints(15)(folder) and last_logged_step(folder) % 5 >= 2, exists("done.json")),
    Point("eval", exists("config.yaml"), exists("done.json")),
    Point("export", exists("config.yaml"), lambda folder: False),  # it takes milliseconds: in it or just after it
]


def last_logged_step(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return len([line for line in lines if "train/loss/0" in line])  # log_every is 1


def start(config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "sstf", "run", str(config)]
    log = (config.parent / "log.txt").open("ab")
    with log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def kill_at(point: Point, run: Run, config: Path) -> None:
    folder = run.folder(point.stage)
    works_in = run.generated if point.stage == "data" else folder
    process = start(config)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not (works_in.exists() and point.reached(works_in)):
            ended = process.poll()
            assert ended is None, f"ended with {ended} before {point.stage}: {(config.parent / 'log.txt').read_text()}"
            assert time.monotonic() < deadline, f"{point.stage} was not reached within {TIMEOUT_S:.0f} s"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not point.over(folder), f"{point.stage} was over before it could be killed; make it last longer"


def results(run: Run) -> dict[str, bytes]:
    """Everything that must be the same bit for bit; times and speeds are not in it."""
    kinds = {"data": "*.safetensors", "extract": "*.safetensors", "train": "head/*", "export": "*/*"}
    found = {
        f"{stage}/{path.relative_to(run.folder(stage))}": path.read_bytes()
        for stage, pattern in kinds.items()
        for path in sorted(run.folder(stage).glob(pattern))
    }
    for name in ("data/conversations.jsonl", "data/tokens.json", "extract/manifest.json"):
        stage, _, file = name.partition("/")
        found[name] = (run.folder(stage) / file).read_bytes()
    return found


def test_killed_in_every_stage_the_result_is_the_same(tiny_target_folder: Path, tmp_path: Path) -> None:
    write_conversations(tmp_path / "conversations.jsonl", 28)
    write_suite(tmp_path / "suite.jsonl")
    base = merge(base_config(tiny_target_folder, tmp_path), LONGER)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(base))
    run = open_run(config)

    for point in POINTS:
        kill_at(point, run, config)
    last = start(config)
    assert last.wait(TIMEOUT_S) == 0, (tmp_path / "log.txt").read_text()

    # Its figures are not compared, so it measures once.
    undisturbed = open_run(config, f"output_dir={tmp_path / 'undisturbed'}", "eval.repeats=1")
    undisturbed.up_to("export")
    expected, found = results(undisturbed), results(run)
    assert len([name for name in expected if "shard" in name]) >= 8
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    # The log holds every step once, whatever was made twice.
    assert last_logged_step(run.folder("train")) == base["train"]["steps"]
    assert not list(run.config.folder.rglob("*.tmp"))
    assert not list(run.config.folder.rglob("*.part"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that: CI may run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_sentence(tiny_target_folder: Path, tmp_path: Path, interruptible: None) -> None:
    write_conversations(tmp_path / "conversations.jsonl", 28)
    write_suite(tmp_path / "suite.jsonl")
    config = tmp_path / "run.yaml"
    base = merge(base_config(tiny_target_folder, tmp_path), {"data.answers.max_new_tokens": 60})
    config.write_text(yaml.safe_dump(base))
    folder = open_run(config).generated
    process = start(config)
    while not (folder / "answers-00000.jsonl").exists():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    log = (tmp_path / "log.txt").read_text()
    assert "interrupted; the same command goes on from here" in log
    assert "Traceback" not in log
