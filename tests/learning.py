"""A head of any method that learned by heart what a target writes after the parity ladder's prompts, so that acceptance
has something to lose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import TrainableMethod, build_method
from sstf.parity.texts import Text
from sstf.targets import Target
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer


def learn_texts(
    target: Target,
    texts: Sequence[Text],
    config: Any,
    folder: Path,
    steps: int,
    step_tokens: int = 1024,
    learning_rate: float = 5e-3,
    precision: str = "fp32",
) -> Path:
    """Train in `folder`; returns the head's."""
    method = build_method(config)
    assert isinstance(method, TrainableMethod)
    samples = [text.sample(f"t{i}") for i, text in enumerate(texts)]
    spec = method.feature_spec(target.spec)
    extract(target, samples, spec, ExtractConfig(shard_tokens=1024), folder / "features", NoProgress())
    train = TrainConfig(
        steps=steps,
        step_tokens=step_tokens,
        optimizer={"learning_rate": learning_rate},
        precision=precision,
        validation_conversations=0,
        validate_every=steps,
        checkpoint_every=steps,
    )
    Trainer(FeatureStore(folder / "features"), method, config, train, folder, 0).run(NoProgress(), "learned", {})
    return folder / "head"
