"""Several processes, started by the launcher that the documentation names, train the head that one process trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ARGUMENTS, launch
from safetensors.torch import load_file
from tiny_store import make_trainer, metrics, train, train_config

from sstf.data.progress import NoProgress
from sstf.features import FeatureStore
from sstf.methods.checkpoint import read_head
from sstf.pipeline import load_run


@pytest.mark.slow  # `test_parallel` shows it step by step, and the training stage is below
def test_two_processes_train_the_same_head_as_one(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(step_tokens=128)
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    train(store, one, config)
    # A run that one process began and two go on with.
    begun = make_trainer(store, resumed, config)
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()

    script = str(Path(__file__).with_name("two_processes.py"))
    done = launch(*ARGUMENTS["ddp"], script, str(store.folder), str(two), str(resumed))
    assert done.returncode == 0, done.stderr[-3000:]
    started = json.loads((two / "summary.json").read_text())
    assert (started["processes"], started["kind"], started["backend"]) == (2, "ddp", "gloo")

    last = "checkpoints/step-00000012/head.safetensors"
    expected = load_file(one / last)
    for folder in (two, resumed):
        found = load_file(folder / last)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=f"{folder.name} {name}")
    for row, same in zip(metrics(two), metrics(one), strict=True):
        assert row.keys() == same.keys()
        for name, value in same.items():
            torch.testing.assert_close(row[name], value, rtol=1e-3, atol=1e-4, msg=name)
    # The chosen heads agree too.
    chosen = [json.loads((folder / "head" / "head.json").read_text())["run"]["step"] for folder in (one, two)]
    assert chosen[0] == chosen[1]


@pytest.mark.slow  # `test_parallel` refuses what such a launch says
def test_a_launch_that_falls_back_to_one_process_is_refused(tmp_path: Path) -> None:
    """`--cpu --num_processes 2` starts one process and says nothing."""
    config = tmp_path / "run.yaml"
    config.write_text("name: tiny\n")
    done = launch("--cpu", "--num_processes", "2", "--module", "sstf.train", str(config))
    assert done.returncode != 0
    assert "started this process alone" in done.stderr
    assert "configs/accelerate/cpu-2.yaml" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp2", "zero1", "zero2", "zero3"))]
)
def test_the_training_stage_of_a_run_on_two_processes(kind: str, tiny_target_folder: Path, tmp_path: Path) -> None:
    """`sstf extract`, then the launcher: the stage is marked as finished, with what the processes trained."""
    rows = [
        {
            "id": f"c{i}",
            "messages": [
                {"role": "user", "content": f"Hello {i}?"},
                {"role": "assistant", "content": f"Hi, number {i * 37} it is."},
            ],
        }
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
name: tiny
output_dir: {tmp_path / "run"}
target: {{name: {tiny_target_folder}, dtype: float32, device: cpu}}
data:
  source: {{kind: jsonl, path: {tmp_path / "rows.jsonl"}}}
  answers: {{kind: keep}}
  max_length: 128
method: {{kind: eagle3, ttt_steps: 2, draft_vocab_size: 200}}
train: {{steps: 4, step_tokens: 256, precision: fp32, validation_conversations: 3}}
"""
    )
    run = load_run(config, [], NoProgress())
    run.up_to("extract")
    done = launch(*ARGUMENTS[kind], "--module", "sstf.train", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = run.summary("train")
    assert summary is not None
    assert (summary["kind"], summary["processes"], summary["steps"]) == (kind, 2, 4)
    assert read_head(run.folder("train") / "head").run["step"] == summary["best_step"]
