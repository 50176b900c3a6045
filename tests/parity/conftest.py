"""A tiny target and a head that learned the ladder's own texts by heart, so that acceptance has something to lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_ladder import NEW, PROMPTS

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import Eagle3Config
from sstf.methods.eagle3 import Eagle3Method
from sstf.parity.texts import write_texts
from sstf.targets import Target
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer


@pytest.fixture(scope="session")
def learned(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a head. Read only: tests alter copies."""
    folder = tmp_path_factory.mktemp("learned")
    config = Eagle3Config(ttt_steps=3, draft_vocab_size=200)
    method = Eagle3Method(config)
    samples = [text.sample(f"t{i}") for i, text in enumerate(write_texts(tiny_target, PROMPTS, NEW))]
    extract(
        tiny_target, samples, method.feature_spec(tiny_target.spec), ExtractConfig(shard_tokens=1024),
        folder / "features", NoProgress(),
    )  # fmt: skip
    train = TrainConfig(
        steps=120,
        step_tokens=1024,
        optimizer={"learning_rate": 5e-3},
        precision="fp32",
        validation_conversations=0,
        validate_every=120,
        checkpoint_every=120,
    )
    Trainer(FeatureStore(folder / "features"), method, config, train, folder, 0).run(NoProgress(), "learned", {})
    return folder / "head"
