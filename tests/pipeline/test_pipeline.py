"""Stages, their keys, and what runs again when."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline_runs import WriteConfig, open_run, write_suite

from sstf import pipeline
from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.tokens import TokenStore
from sstf.errors import ConfigError, DamagedDataError, DataError
from sstf.features import FeatureStore
from sstf.methods.checkpoint import read_head
from sstf.pipeline import STAGES

FILES = {
    "data": ["tokens.safetensors", "tokens.json", "conversations.jsonl", "report.json", "lint.json"],
    "extract": ["manifest.json", "frozen.safetensors", "shard-00000.safetensors"],
    "train": ["head/head.safetensors", "head/head.json", "metrics.jsonl", "checkpoints/step-00000004/progress.json"],
    "eval": ["report.json", "report.md", "report.html", "rejections.json"],
    "export": [
        "vllm/model.safetensors",
        "vllm/config.json",
        "sglang/model.safetensors",
        "sglang/config.json",
        "speculators/config.json",
    ],
}


def refuse(*args: object) -> None:
    raise AssertionError("the target was loaded")


def changed(before: Path, *overrides: str) -> list[str]:
    """Stages whose key the overrides change."""
    old, new = open_run(before).keys, open_run(before, *overrides).keys
    return [stage for stage in STAGES if old[stage] != new[stage]]


def test_a_whole_run_leaves_every_file(finished: Path) -> None:
    run = open_run(finished)
    for stage, files in FILES.items():
        folder = run.folder(stage)
        for name in [*files, "config.yaml", "done.json"]:
            assert (folder / name).is_file(), f"{stage}: {name}"
    assert [path.name for path in sorted(run.generated.iterdir())] == [f"answers-0000{i}.jsonl" for i in range(3)]
    assert run.summary("data") == {
        "conversations": 12,
        "tokens": FeatureStore(run.folder("extract")).tokens,
        # 12 first answers and 4 second ones, none of which ends before its 16 tokens unless with an end token
        "trained_tokens": sum(sum(s.loss_mask) for s in TokenStore(run.folder("data")).read()),
        "dropped": {},
    }
    extracted = run.summary("extract")
    assert extracted is not None and 0.3 < extracted.pop("argmax_share") <= 1
    assert extracted == {
        "conversations": 12,
        "tokens": FeatureStore(run.folder("extract")).tokens,
        "layers": [1, 3, 4],  # 1, 8 // 2 - 1 and 8 - 4
    }
    trained = run.summary("train")
    assert trained is not None and trained["steps"] == 4 and trained["processes"] == 1
    assert trained["parity"]["verdict"] == "pass"
    names = [rung["name"] for rung in trained["parity"]["rungs"]]
    assert names[:3] == ["trainer", "reloaded", "export vllm"]
    evaluated = run.summary("eval")
    assert (
        evaluated is not None and [row["arm"] for row in evaluated["rows"]] == ["plain", "ngram", "chain", "tree"] * 2
    )
    assert run.summary("export") == {"engines": ["vllm", "sglang", "speculators"]}


def test_a_finished_run_does_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_configured", refuse)
    monkeypatch.setattr(pipeline, "read_head", refuse)
    head = open_run(finished).folder("train") / "head" / "head.safetensors"
    written = head.stat().st_mtime_ns
    started = time.perf_counter()
    open_run(finished).up_to("eval", "export")
    assert time.perf_counter() - started < 0.5
    assert head.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("train.optimizer.learning_rate=2e-3", ["train", "eval", "export"]),
        ("seed=5", ["train", "eval", "export"]),
        ("method.ttt_steps=3", ["train", "eval", "export"]),
        ("method.layers=[2, 4, 6]", ["extract", "train", "eval", "export"]),
        ("eval.max_new_tokens=7", ["eval"]),
        ("export.engines=[vllm]", ["export"]),
        ("extract.shard_tokens=512", ["extract", "train", "eval", "export"]),
        ("data.max_length=100", list(STAGES)),
        ("target.dtype=bfloat16", list(STAGES)),
        ("train.trackers=[wandb]", []),
        ("train.log_every=3", []),
        ("train.checkpoint_every=3", []),
        ("train.keep_last=5", []),
        ("train.parity=false", []),
        ("name=other", []),
    ],
)
def test_what_a_setting_runs_again(finished: Path, override: str, stages: list[str]) -> None:
    assert changed(finished, override) == stages


def test_an_edited_file_is_another_input(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    before = open_run(config).keys
    with (tmp_path / "conversations.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "one more"}]}) + "\n")
    after = open_run(config).keys
    assert all(after[stage] != before[stage] for stage in STAGES)
    write_suite(tmp_path / "suite.jsonl", 3)
    last = open_run(config).keys
    assert [stage for stage in STAGES if last[stage] != after[stage]] == ["eval"]


def test_other_weights_in_the_same_folder_are_another_target(
    write_config: WriteConfig, tiny_target_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_target_folder, tmp_path / "copy")
    config = write_config(target__name=str(copy))
    before = open_run(config).keys["data"]
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert open_run(config).keys["data"] != before


def test_only_the_changed_stages_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_configured", refuse)
    run = open_run(finished, "train.steps=2", "train.parity=false")
    run.up_to("export")
    assert read_head(run.folder("train") / "head").run["step"] == 2
    assert run.folder("data") == open_run(finished).folder("data")
    assert run.summary("eval") is None


@pytest.mark.parametrize("stage", STAGES)
def test_the_written_configuration_reads_back_equal(finished: Path, stage: str) -> None:
    run = open_run(finished)
    assert load(RunConfig, run.folder(stage) / "config.yaml") == run.config


def test_a_second_run_in_the_folder_is_refused(finished: Path) -> None:
    run = open_run(finished)
    with (run.config.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is working in .*/run; wait for it"):
            run.up_to("data")
        with pytest.raises(ConfigError, match="another process is working"):
            open_run(finished, "train.steps=3").train_only()
    run.up_to("data")


def test_the_lock_dies_with_its_process(finished: Path) -> None:
    run = open_run(finished)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.config.folder / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="another process"):
        run.up_to("data")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    run.up_to("data")


def test_what_a_killed_writer_left_is_removed(write_config: WriteConfig) -> None:
    run = open_run(write_config())
    leftover = run.folder("data") / ".tokens.safetensors.123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    run.up_to("data")
    assert not leftover.exists()
    assert (run.folder("data") / "tokens.safetensors").is_file()


def test_a_deleted_result_is_made_again_and_is_the_same(finished: Path, tmp_path: Path) -> None:
    """What messages about damaged files advise: delete the named files and run again."""
    shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    run = open_run(finished, f"output_dir={tmp_path / 'run'}")
    data, features = run.folder("data"), run.folder("extract")
    files = [data / "tokens.safetensors", features / "shard-00000.safetensors"]
    expected = [file.read_bytes() for file in files]
    for file in [*files, data / "tokens.json", features / "manifest.json"]:
        file.unlink()
    kept = (features / "shard-00001.safetensors").stat().st_mtime_ns
    run.up_to("extract")
    assert [file.read_bytes() for file in files] == expected
    assert (features / "shard-00001.safetensors").stat().st_mtime_ns == kept


def test_a_damaged_mark_of_completion_is_named(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    run = open_run(finished, f"output_dir={tmp_path / 'run'}")
    (run.folder("data") / "done.json").write_text("{")
    with pytest.raises(DamagedDataError, match=r"done\.json: not valid JSON"):
        run.up_to("data")


def test_a_method_without_training_is_evaluated(write_config: WriteConfig) -> None:
    config = write_config(method={"kind": "ngram", "max_n": 3}, eval__policies={"mine": {"kind": "chain", "depth": 2}})
    run = open_run(config)
    run.up_to("eval")
    summary = run.summary("eval")
    assert summary is not None and [row["arm"] for row in summary["rows"]] == ["plain", "ngram", "mine"] * 2
    assert not (run.config.folder / "data").exists()  # evaluation needs nothing else
    for stage in ("extract", "train", "export"):
        with pytest.raises(ConfigError, match=r"method\.kind=ngram needs no training"):
            run.up_to(stage)
    with pytest.raises(ConfigError, match="needs no training"):
        run.train_only()
    # Its settings decide its result, those of stages that it does not need do not.
    assert open_run(config, "method.max_n=4").keys["eval"] != run.keys["eval"]
    assert open_run(config, "train.optimizer.learning_rate=1e-5", "data.max_length=64").keys["eval"] == run.keys["eval"]


def test_training_alone_needs_the_features(write_config: WriteConfig) -> None:
    with pytest.raises(ConfigError, match="run `sstf extract` with it first"):
        open_run(write_config()).train_only()


def test_training_alone_gives_the_head_of_the_whole_run(finished: Path, tmp_path: Path) -> None:
    original = open_run(finished)
    for stage in ("data", "extract"):
        shutil.copytree(original.folder(stage), tmp_path / "run" / stage / original.keys[stage])
    run = open_run(finished, f"output_dir={tmp_path / 'run'}")
    run.train_only()
    head = "head/head.safetensors"
    assert (run.folder("train") / head).read_bytes() == (original.folder("train") / head).read_bytes()
    assert run.summary("train") is not None


def test_a_broken_suite_stops_before_any_work(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text("{\n")
    run = open_run(write_config())
    with pytest.raises(DataError, match=r"suite\.jsonl:1: expected a JSON object"):
        run.up_to("eval", "export")
    assert not (run.config.folder / "data").exists()


def test_missing_layers_stop_before_answers_are_generated(write_config: WriteConfig) -> None:
    run = open_run(write_config(method__layers=[1, 8]))
    with pytest.raises(ConfigError, match=r"has layers 0 to 7, cannot read \[1, 8\]"):
        run.up_to("data")
    assert not list(run.folder("data").glob("answers-*"))
