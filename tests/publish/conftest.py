"""A finished run on the tiny target, a folder published from it, and a hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_stand_in import REPO, StandIn, use_hub

from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.progress import NoProgress
from sstf.pipeline import Run
from sstf.publish import folder as folder_module
from sstf.publish.folder import Publication, make_folder
from sstf.publish.gate import read_back

WORDS = ["sun", "moon", "tea", "bread", "rain", "stone", "river", "lamp"]


@pytest.fixture(scope="session")
def run_config(tiny_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of which every stage is done, with a suite of its own."""
    folder = tmp_path_factory.mktemp("run")
    asks = [" ".join(WORDS[(i * k) % len(WORDS)] for k in (1, 3, 5)) + f" {i}?" for i in range(12)]
    chats = [{"id": f"c{i}", "messages": [{"role": "user", "content": ask}]} for i, ask in enumerate(asks)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    # Its prompts are trained on, so that a head learns enough of them in seconds to be accepted.
    suite = [{"prompt": ask, "category": "ab"[i % 2]} for i, ask in enumerate(asks[:4])]
    (folder / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in suite))
    fields = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "target": {"name": str(tiny_target_folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(folder / "chats.jsonl")},
            "answers": {
                "kind": "regenerate",
                "temperatures": [0.0],
                "max_new_tokens": 16,
                "group_size": 4,
                "slots": 4,
            },
            "max_length": 96,
            "filters": {"near_duplicates": None},
        },
        "extract": {"shard_tokens": 256, "batch_tokens": 128},
        "method": {"kind": "eagle3", "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {
            "steps": 60,
            "step_tokens": 128,
            "optimizer": {"learning_rate": 1e-2},
            "precision": "fp32",
            "validation_conversations": 2,
            "validate_every": 20,
            "checkpoint_every": 30,
            "log_every": 10,
        },
        "eval": {
            "suite": str(folder / "suite.jsonl"),
            "max_new_tokens": 8,
            "temperatures": [0.0],
            "repeats": 1,
            "policies": {"chain": {"kind": "chain", "depth": 2}},
        },
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(fields))
    Run(load(RunConfig, config, []), NoProgress()).up_to("eval", "export")
    return config


@pytest.fixture(scope="session")
def head(run_config: Path) -> Path:
    return next((run_config.parent / "run").glob("train/*/head"))


@pytest.fixture(scope="session")
def published(head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder. Its head learned for seconds: checks that want a trained one are left out."""
    out = tmp_path_factory.mktemp("published") / "tiny-head"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "CHECKS", (read_back,))
        make_folder(Publication(head, REPO), out, NoProgress())
    return out


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(published, tmp_path / "tiny-head"))


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "CHECKS", (read_back,))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """The hub, and the key of somebody who may write there."""
    stand_in = StandIn()
    use_hub(monkeypatch, tmp_path, stand_in.url)
    yield stand_in
    stand_in.close()
