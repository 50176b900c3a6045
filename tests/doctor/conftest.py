"""One finished run of a tiny target, whose head is trained far enough that every alignment but its own is worse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.progress import NoProgress
from sstf.doctor import probe
from sstf.evaluation import load_suite
from sstf.pipeline import Run
from sstf.targets import Target


def config_of(target: Path, folder: Path) -> dict[str, object]:
    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "target": {"name": str(target), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(folder / "requests.jsonl")},
            "answers": {"kind": "regenerate", "temperatures": [0.5], "max_new_tokens": 64, "slots": 64},
            "max_length": 192,
            "filters": {"near_duplicates": None, "suites": []},
        },
        "extract": {"shard_tokens": 4096, "batch_tokens": 2048},
        "method": {"kind": "eagle3", "layers": [2, 4, 6], "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {
            "steps": 70,
            "step_tokens": 768,
            "optimizer": {"kind": "muon", "learning_rate": 0.02},
            "precision": "fp32",
            "validation_conversations": 8,
            "validate_every": 35,
            "checkpoint_every": 35,
            "log_every": 5,
        },
        "eval": {"suite": "builtin", "prompts": 2, "max_new_tokens": 4, "repeats": 1},
    }


def open_run(config: Path) -> Run:
    return Run(load(RunConfig, config, []), NoProgress())


@pytest.fixture(scope="session")
def doctor_target_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with larger embeddings and logits: its next token is nearly certain, and follows from the last
    tokens, so that a head learns it in seconds."""
    folder = tmp_path_factory.mktemp("doctor") / "target"
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
        model.lm_head.weight.mul_(4)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_config(doctor_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run up to its head. Tests that alter its results work on a copy."""
    folder = tmp_path_factory.mktemp("doctor-run")
    texts = [prompt.messages[0].content for prompt in load_suite("builtin")]
    asked = [text[start : start + 40] for start in (0, 40, 80) for text in texts if len(text) > start + 20][:150]
    rows = [{"id": f"c{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(asked)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(config_of(doctor_target_folder, folder)), encoding="utf-8")
    open_run(config).up_to("train")
    return config


@pytest.fixture(scope="session")
def run(finished_config: Path) -> Run:
    return open_run(finished_config)


@pytest.fixture(scope="session")
def target(run: Run) -> Target:
    """Shared: change it through `monkeypatch` only."""
    return run.target


@pytest.fixture
def head(run: Run, tmp_path: Path) -> Path:
    """A copy of the trained head, to be spoilt."""
    return Path(shutil.copytree(run.folder("train") / "head", tmp_path / "head"))


@pytest.fixture
def training(run: Run, tmp_path: Path) -> Path:
    """A copy of the training's folder."""
    return Path(shutil.copytree(run.folder("train"), tmp_path / "training"))


ANSWERS: dict[object, list[list[int]]] = {}
ANSWER = probe._answers


@pytest.fixture(autouse=True)
def answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target's answers are the same each time, and half of the time of a check: they are kept between tests, unless a
    test changes how they are drawn."""

    def answers(target: Target, prompts: list[list[int]]) -> list[list[int]]:
        key = (target.spec.fingerprint, probe.BatchSampler.sample)
        if key not in ANSWERS:
            ANSWERS[key] = ANSWER(target, prompts)
        return ANSWERS[key]

    monkeypatch.setattr(probe, "_answers", answers)
