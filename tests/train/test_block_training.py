"""Block drafters under the real trainer: learned by heart they draft almost everything; stopped runs go on the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_store import PROMPT, head_bytes, train_config

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.features import FeatureStore
from sstf.methods import DFlashConfig, DominoConfig, DSparkConfig, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import load_head
from sstf.targets import Target
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.trees import Chain, DynamicTree
from sstf.types import TokenSample

SHAPE = {"layers": (1, 3, 4), "num_layers": 1, "block_size": 4}
KINDS: dict[str, Any] = {
    "dflash": DFlashConfig(**SHAPE),
    "dflash-d-pace": DFlashConfig(**SHAPE, weights={"kind": "d_pace"}),
    "domino": DominoConfig(**SHAPE, gru_size=32, rank=16),
    # The tiny target is unsure of its own tokens; so are confidences, which learn overlaps, and nodes of a small tree.
    "dspark": DSparkConfig(**(SHAPE | {"block_size": 3, "num_layers": 2}), rank=16, verify_above=0.0),
}


def make(kind: str, store: FeatureStore, folder: Path, config: TrainConfig) -> Trainer:
    method = build_method(KINDS[kind])
    assert isinstance(method, TrainableMethod)
    return Trainer(store, method, KINDS[kind], config, folder, 0)


@pytest.mark.parametrize(
    "kind", [kind if kind == "dflash" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_learned_by_heart(
    kind: str, store: FeatureStore, samples: list[TokenSample], tiny_target: Target, tmp_path: Path
) -> None:
    config = train_config(
        steps=50, step_tokens=512, optimizer={"kind": "muon", "learning_rate": 2e-2}, validation_conversations=0,
        checkpoint_every=50,
    )  # fmt: skip
    make(kind, store, tmp_path, config).run(NoProgress(), "tiny", {})
    head = load_head(tmp_path / "head", tiny_target)
    for policy in (Chain(depth=3), DynamicTree(depth=3, top_k=3, total_tokens=18)):
        decoder = SpeculativeDecoder(tiny_target, head, policy)
        lengths: list[int] = []
        for sample in samples[:8]:
            answer = sample.input_ids[PROMPT:]
            found = decoder.generate(sample.input_ids[:PROMPT], len(answer))
            assert found.token_ids == answer
            lengths += found.accepted_lengths[:-1]  # the last pass is cut by the length limit
        assert sum(lengths) / len(lengths) > 0.85 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_two_parts_is_the_run(kind: str, store: FeatureStore, tmp_path: Path) -> None:
    """Anchors are drawn by conversation and step: weights are equal to the bit."""
    config = train_config(steps=6, checkpoint_every=3, validation_conversations=0)
    make(kind, store, tmp_path / "whole", config).run(NoProgress(), "tiny", {})
    first = make(kind, store, tmp_path / "parts", config)
    for _ in range(3):
        first.train_step()
    first._checkpoint()
    make(kind, store, tmp_path / "parts", config).run(NoProgress(), "tiny", {})
    assert head_bytes(tmp_path / "whole") == head_bytes(tmp_path / "parts")


def test_batches_say_how_far_the_training_is(store: FeatureStore, tmp_path: Path) -> None:
    """For losses that change on the way: 0 in the first step; outside of a training, the loss that it ends with."""
    trainer = make("domino", store, tmp_path, train_config(steps=8))
    found = [{batch.progress for batch, _ in trainer.feed.step(step)} for step in (0, 1, 6)]
    assert found == [{0.0}, {1 / 8}, {6 / 8}]
    assert {batch.progress for batch in trainer.feed.once([0, 1, 2])} == {1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_learns_the_same(kind: str, store: FeatureStore, tmp_path: Path) -> None:
    """The gradient of a step is that of float32 but for rounding; the masters stay float32."""
    norms = []
    for precision in ("fp32", "bf16"):
        trainer = make(kind, store, tmp_path / precision, train_config(precision=precision, step_tokens=256))
        norms.append(trainer.train_step()["grad_norm"])
        assert {p.dtype.itemsize for p in trainer.module.head.parameters()} == {4}
    assert norms[1] == pytest.approx(norms[0], rel=0.03)
