"""Short trainings of every other method than EAGLE-3, as a library and as what `accelerate launch` runs.

As a program: `every_method.py STORES OUT` trains each on all the processes that the launcher started: once in one go
and once in two, where a second trainer goes on from the first one's checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_store import train_config

from sstf.data.progress import NoProgress
from sstf.features import FeatureSource, FeatureStore
from sstf.methods import (
    DFlashConfig,
    DominoConfig,
    DSparkConfig,
    EagleConfig,
    EarlyExitConfig,
    MedusaConfig,
    PEagleConfig,
    build_method,
)
from sstf.methods.base import TrainableMethod
from sstf.train.parallel import close_launch
from sstf.train.trainer import Trainer

BLOCKS: dict[str, Any] = {"layers": (1, 3, 4), "num_layers": 1, "block_size": 4}
METHODS: dict[str, Any] = {
    "eagle": EagleConfig(ttt_steps=2),
    "p_eagle": PEagleConfig(layers=(1, 3, 4), num_layers=1, depth=3, draft_vocab_size=200),
    "medusa": MedusaConfig(heads=3),
    "dflash": DFlashConfig(**BLOCKS),
    "domino": DominoConfig(**BLOCKS, gru_size=32, rank=16),
    "dspark": DSparkConfig(**BLOCKS, rank=16),
    "early_exit": EarlyExitConfig(exit_layer=4, depth=3, draft_vocab_size=200),
}
STEPS = 4
# Adam divides by sqrt(v) + eps: with the usual 1e-8, rounding shows at first wherever a gradient is near zero.
CONFIG = train_config(
    steps=STEPS, step_tokens=128, checkpoint_every=STEPS, validate_every=STEPS,
    optimizer={"learning_rate": 2e-3, "eps": 1e-5},
)  # fmt: skip


def method_of(kind: str) -> TrainableMethod:
    method = build_method(METHODS[kind])
    assert isinstance(method, TrainableMethod)
    return method


def trainer_of(kind: str, source: FeatureSource, folder: Path) -> Trainer:
    return Trainer(source, method_of(kind), METHODS[kind], CONFIG, folder, 0)


def in_one_go(kind: str, source: FeatureSource, folder: Path) -> None:
    trainer_of(kind, source, folder).run(NoProgress(), "tiny", {})


def in_two(kind: str, source: FeatureSource, folder: Path) -> None:
    begun = trainer_of(kind, source, folder)
    for _ in range(STEPS // 2):
        begun.train_step()
    begun._checkpoint()
    resumed = trainer_of(kind, source, folder)
    assert resumed.progress.step == STEPS // 2
    resumed.run(NoProgress(), "tiny", {})


def main() -> None:
    torch.set_num_threads(1)
    stores, out = Path(sys.argv[1]), Path(sys.argv[2])
    folders: dict[str, str] = json.loads((stores / "folders.json").read_text(encoding="utf-8"))
    for kind, name in folders.items():
        source = FeatureStore(stores / name)
        in_one_go(kind, source, out / kind / "whole")
        in_two(kind, source, out / kind / "parts")
        facts = trainer_of(kind, source, out / kind / "whole").launch.facts()
        (out / kind / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    close_launch()


if __name__ == "__main__":
    main()
