"""The memory formulas against peak resident memory, each stage in a process of its own, on the embedded target."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TOLERANCE = {"regeneration": 0.2, "extraction": 0.2, "training": 0.1}

# Prints the planned bytes and VmHWM of one stage.
PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import torch
from sstf.data.chat_template import render
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.conversations import read_conversations
from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.features.shards import threads_for
from sstf.methods import Eagle3Config, EagleConfig, build_method
from sstf.planning import sizes
from sstf.machine import resident_memory
from sstf.targets import load_target
from sstf.targets.outline import outline
from sstf.targets.huggingface import TargetConfig
from sstf.targets.sampling import BatchSampler
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.types import SamplingParams, TokenSample

stage, a, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
name = "smollm2-135m-instruct"
torch.manual_seed(0)
shape = outline(TargetConfig(name=name, device="cpu"))
before = resident_memory()

def rows(count, length):
    # The packaged sample, end to end; 79 % of its tokens are trained.
    config = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=60)
    whole = [render(shape.tokenizer, c, None) for c in read_conversations(config).conversations]
    ids = [token for s in whole for token in s.input_ids]
    mask = [flag for s in whole for flag in s.loss_mask]
    cuts = [slice(i * length, (i + 1) * length) for i in range(count)]
    return [TokenSample(str(i), ids[cut], mask[cut]) for i, cut in enumerate(cuts)]

if a.get("eagle"):
    method = build_method(EagleConfig(ttt_steps=a["steps"], draft_vocab_size=a.get("draft_vocab")))
else:
    method = build_method(Eagle3Config(ttt_steps=a.get("steps", 3), draft_vocab_size=a.get("draft_vocab", 8192)))
if stage == "regeneration":
    target = load_target(name, device="cpu")
    prompts = [s.input_ids for s in rows(a["slots"], a["prompt"])]
    params = [SamplingParams(0.8, 0.95, 256, 8, seed=i) for i in range(a["slots"])]
    BatchSampler(target).sample(prompts, params, a["slots"])
    planned = sizes.regeneration(shape.spec, shape.parameters, a["slots"], a["prompt"] + 8, a["prompt"])
if stage == "extraction":
    target, spec = load_target(name, device="cpu"), method.feature_spec(shape.spec)
    config = ExtractConfig(batch_tokens=a["batch"], shard_tokens=4096)
    with tempfile.TemporaryDirectory() as scratch:
        extract(target, rows(4096 // a["length"], a["length"]), spec, config, Path(scratch), NoProgress())
    planned = sizes.extraction(shape.spec, shape.parameters, 3, a["batch"], 4096, threads_for("cpu"))
if stage == "store":
    target = load_target(name, device="cpu")
    extract(target, rows(16, 512), method.feature_spec(shape.spec), ExtractConfig(), folder, NoProgress())
    sys.exit(print("{}"))
if stage == "training":
    kind, each = ("muon", 0.02) if a.get("muon") else ("adamw", 1e-3)
    config = TrainConfig(
        steps=100, step_tokens=a["batch"], validation_conversations=0, batch_tokens=a.get("micro_batch", "auto"),
        precision="fp32" if a.get("fp32") else "bf16", optimizer={"kind": kind, "learning_rate": each},
        ema=0.99 if a.get("ema") else None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(FeatureStore(folder), method, method.config, config, Path(scratch), 0)
        for _ in range(3):
            trainer.train_step()
    planned = trainer.budget
peak = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:")][0]
print(json.dumps({"planned": before + (planned.need if stage == "training" else planned.bytes), "peak": peak}))
"""


def measure(stage: str, settings: dict[str, int], folder: str) -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, stage, json.dumps(settings), folder], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("features")
    measure("store", {}, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def last_layer_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("last-layer")
    measure("store", {"eagle": 1, "steps": 1}, str(folder))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("regeneration", {"slots": 8, "prompt": 64}),
        ("regeneration", {"slots": 32, "prompt": 64}),
        ("regeneration", {"slots": 32, "prompt": 256}),
        ("extraction", {"length": 256, "batch": 1024}),
        ("extraction", {"length": 256, "batch": 4096}),
        ("training", {"batch": 512}),
        ("training", {"batch": 2048}),
        ("training", {"batch": 1024, "steps": 7}),
        ("training", {"batch": 1024, "draft_vocab": 1024}),
        ("training", {"batch": 1024, "draft_vocab": 32000}),
        ("training", {"batch": 2048, "micro_batch": 512}),
        ("training", {"batch": 1024, "fp32": 1}),
        ("training", {"batch": 1024, "muon": 1, "ema": 1}),
    ],
)
def test_a_stage_holds_what_was_planned(stage: str, settings: dict[str, int], store: str) -> None:
    check(stage, settings, store)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 1024, "steps": 1},
        {"batch": 1024, "steps": 3},
        {"batch": 1024, "steps": 3, "draft_vocab": 8192},
        {"batch": 1024, "steps": 3, "fp32": 1},
    ],
)
def test_a_head_that_drafts_with_the_target_s_lm_head(settings: dict[str, int], last_layer_store: str) -> None:
    """Nothing of the size of lm_head is learned: no gradient, and rows of its own for a smaller vocabulary alone."""
    check("training", settings | {"eagle": 1}, last_layer_store)


def check(stage: str, settings: dict[str, int], store: str) -> None:
    found = measure(stage, settings, store)
    error = found["planned"] / found["peak"] - 1
    print(f"{stage} {settings}: planned {found['planned'] / 2**20:.0f} MiB, peak {found['peak'] / 2**20:.0f} MiB")
    assert abs(error) <= TOLERANCE[stage], error
