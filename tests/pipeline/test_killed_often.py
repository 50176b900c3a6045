"""`kill -9` at random moments of regeneration and of extraction, twenty times; then one clean run, and its store is
that of a run that nobody disturbed, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pipeline_runs import base_config, merge, open_run, write_conversations, write_suite

from sstf.pipeline import Run

KILLS = {"data": 10, "extract": 10}
# A stage is many small groups or shards, so that it outlives its kills on a fast machine too.
LONG = {
    "data.answers.max_new_tokens": 24,
    "data.answers.group_size": 2,
    "data.answers.slots": 2,
    "extract.shard_tokens": 256,
    "extract.batch_tokens": 64,
}


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "sstf", "extract", str(config)], env=environment, stdout=file, stderr=file
        )


def written(run: Run, stage: str) -> int:
    """Finished groups or shards; each is a file that appears at once."""
    if stage == "data":
        return len(list(run.generated.glob("answers-*.jsonl")))
    return len(list(run.folder(stage).glob("shard-*.json")))


@pytest.mark.slow
def test_killed_twenty_times_the_store_is_the_same(tiny_target_folder: Path, tmp_path: Path) -> None:
    write_conversations(tmp_path / "conversations.jsonl", 500)
    write_suite(tmp_path / "suite.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(merge(base_config(tiny_target_folder, tmp_path), LONG)))
    log, run = tmp_path / "log.txt", open_run(config)
    moments = random.Random(7)

    for stage, kills in KILLS.items():
        for kill in range(kills):
            process = start(config, log)
            before = written(run, stage)
            deadline = time.monotonic() + 120
            while written(run, stage) <= before:  # working: what it does from here on is lost at any moment
                assert process.poll() is None, f"{stage}, kill {kill}: ended by itself\n{log.read_text()}"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (run.folder(stage) / "done.json").exists(), f"{stage} was over before its last kill"
        # Let the stage finish and the next one begin.
        if stage == "data":
            run.up_to("data")
    last = start(config, log)
    assert last.wait(300) == 0, log.read_text()

    undisturbed = open_run(config, f"output_dir={tmp_path / 'undisturbed'}")
    undisturbed.up_to("extract")
    for stage in KILLS:
        found, expected = run.folder(stage), undisturbed.folder(stage)
        names = sorted(path.name for path in expected.iterdir() if path.name != "config.yaml")
        assert sorted(path.name for path in found.iterdir() if path.name != "config.yaml") == names
        assert [name for name in names if (found / name).read_bytes() != (expected / name).read_bytes()] == []
    assert len(list(run.folder("extract").glob("shard-*.json"))) > 20
