"""A whole run on the tiny target, small enough to go through every stage in a few seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.progress import NoProgress
from sstf.pipeline import Run

WORDS = ["sun", "moon", "tea", "bread", "rain", "stone", "river", "lamp", "green", "seven"]


def write_conversations(path: Path, count: int) -> Path:
    """`count` conversations of one turn; every third has two."""
    rows = []
    for i in range(count):
        ask = " ".join(WORDS[(i * k) % len(WORDS)] for k in (1, 3, 7)) + f" {i}?"
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": "Hello"}]
        rows.append({"id": f"c{i}", "messages": turns + ([] if i % 3 else [{"role": "user", "content": "more?"}])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_suite(path: Path, count: int = 4) -> Path:
    rows = [{"prompt": f"{WORDS[i]} {WORDS[-i]}?", "category": "ab"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` holds dotted keys; a value of None removes the key."""
    out = copy.deepcopy(base)
    for dotted, value in changes.items():
        *sections, last = dotted.split(".")
        section = out
        for name in sections:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return out


WriteConfig = Callable[..., Path]


def base_config(target: Path, folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "target": {"name": str(target), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(folder / "conversations.jsonl")},
            "answers": {"kind": "regenerate", "max_new_tokens": 16, "group_size": 4, "slots": 4},
            "max_length": 128,
            "filters": {"near_duplicates": None},  # the requests are a few words out of ten
        },
        "extract": {"shard_tokens": 256, "batch_tokens": 128},
        "method": {"kind": "eagle3", "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {
            "steps": 4,
            "step_tokens": 128,
            "optimizer": {"learning_rate": 1e-3},
            "precision": "fp32",
            "validation_conversations": 2,
            "validate_every": 2,
            "checkpoint_every": 2,
            "log_every": 1,
        },
        "eval": {"suite": str(folder / "suite.jsonl"), "max_new_tokens": 6, "repeats": 1},
    }


def open_run(config: Path, *overrides: str) -> Run:
    return Run(load(RunConfig, config, overrides), NoProgress())
