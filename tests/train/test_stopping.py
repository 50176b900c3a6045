"""Real processes that are asked to end, or killed; and runs that go on with another number of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from launching import ARGUMENTS, ROOT, finish, launch, start
from safetensors.torch import load_file
from tiny_store import make_trainer, train, train_config

from sstf.data.progress import NoProgress
from sstf.features import FeatureStore
from sstf.pipeline import Run, load_run

STEPS = 200


@pytest.fixture
def ready(tiny_target_folder: Path, tmp_path: Path) -> Path:
    """The configuration of a run whose features are there, and whose training takes many short steps."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Hello {i}?"},
                {"role": "assistant", "content": f"Hi, number {i * 37} it is."},
            ]
        }
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    content = {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "target": {"name": str(tiny_target_folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            "answers": {"kind": "keep"},
            "max_length": 128,
        },
        "method": {"kind": "eagle3", "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {
            "steps": STEPS,
            "step_tokens": 256,
            "precision": "fp32",
            "validation_conversations": 3,
            "validate_every": 50,
            "checkpoint_every": 20,
            "log_every": 1,
        },
    }
    config.write_text(yaml.safe_dump(content))
    load_run(config, [], NoProgress()).up_to("extract")
    return config


def sstf_train(config: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sstf", "train", str(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def step_of(run: Run) -> int:
    """The last step in the log."""
    log = run.folder("train") / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def wait_for(run: Run, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while step_of(run) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def result(run: Run) -> tuple[bytes, bytes]:
    """What a training leaves: the kept head, and the last weights."""
    folder = run.folder("train")
    last = folder / "checkpoints" / f"step-{STEPS:08d}" / "head.safetensors"
    return (folder / "head" / "head.safetensors").read_bytes(), last.read_bytes()


def test_sigterm_saves_and_ends_with_0(ready: Path, tmp_path: Path) -> None:
    run = load_run(ready, [], NoProgress())
    process = sstf_train(ready)
    wait_for(run, 30, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the training is saved after step" in done.stderr
    assert "Traceback" not in done.stderr
    saved = sorted((run.folder("train") / "checkpoints").iterdir())[-1]
    assert int(saved.name[5:]) == step_of(run) < STEPS
    assert run.summary("train") is None  # not finished

    run.up_to("train")
    undisturbed = load_run(ready, [f"output_dir={tmp_path / 'undisturbed'}"], NoProgress())
    undisturbed.up_to("train")
    assert result(run) == result(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments(ready: Path, tmp_path: Path) -> None:
    """`kill -9` and SIGTERM by turns, wherever the training is; the head is that of a run that nobody disturbed."""
    run, moments = load_run(ready, [], NoProgress()), random.Random(3)
    for kill in range(6):
        process, before = sstf_train(ready), step_of(run)
        wait_for(run, min(before + moments.randrange(5, 30), STEPS - 20), process)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL if kill % 2 else signal.SIGTERM)
        assert finish(process, 60).returncode == (-signal.SIGKILL if kill % 2 else 0)
    assert run.summary("train") is None
    run.up_to("train")
    undisturbed = load_run(ready, [f"output_dir={tmp_path / 'undisturbed'}"], NoProgress())
    undisturbed.up_to("train")
    assert result(run) == result(undisturbed)


def test_sigterm_to_two_processes(ready: Path) -> None:
    """Batch systems signal every process; all save the same step and leave together."""
    run = load_run(ready, [], NoProgress())
    process = start(*ARGUMENTS["ddp"], "-m", "sstf.train", str(ready))
    wait_for(run, 10, process)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    children = [int(line) for line in found.stdout.split()]
    assert len(children) == 2
    os.kill(children[1], signal.SIGTERM)  # one is enough for both
    done = finish(process, 90)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the training is saved after step" in done.stderr
    saved = sorted((run.folder("train") / "checkpoints").iterdir())[-1]
    assert int(saved.name[5:]) == step_of(run) < STEPS


@pytest.mark.parametrize(
    "kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_one_process_then_two_then_one(store: FeatureStore, tmp_path: Path, kind: str) -> None:
    """Elastic: the head is that of one process all along."""
    config = train_config(step_tokens=128)
    train(store, tmp_path / "alone", config)
    run = tmp_path / "elastic"
    begun = make_trainer(store, run, config)
    while begun.progress.step < 4:
        begun.train_step()
    begun._checkpoint()
    script = str(Path(__file__).with_name("until_step.py"))
    done = launch(*ARGUMENTS[kind], script, str(store.folder), str(run), "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"'kind': '{kind}', 'processes': 2" in done.stdout
    train(store, run, config)
    for part in ("head", "optimizer"):
        name = f"checkpoints/step-00000012/{part}.safetensors"
        found, expected = load_file(run / name), load_file(tmp_path / "alone" / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
