"""Medusa heads from the target's own features to decoded text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny_store import PROMPT, train_config

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import MedusaConfig
from sstf.methods.checkpoint import load_head
from sstf.methods.medusa import MedusaMethod
from sstf.targets import Target
from sstf.train.trainer import Trainer
from sstf.trees import Chain, StaticTree
from sstf.types import HiddenTeacher, TokenSample

METHOD = MedusaConfig(heads=3, lm_head="own")


def make_store(target: Target, samples: list[TokenSample], folder: Path) -> FeatureStore:
    settings = ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128)
    extract(target, samples, MedusaMethod(METHOD).feature_spec(target.spec), settings, folder, NoProgress())
    return FeatureStore(folder)


def test_stored_features_and_the_frozen_norm_are_what_the_teacher_is(
    tiny_target: Target, samples: list[TokenSample], tmp_path: Path
) -> None:
    """Row t's features are of h_t, and its teacher is of h_{t+1}, after the norm."""
    store = make_store(tiny_target, samples[:3], tmp_path)
    head = MedusaMethod(METHOD).build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    rows = store[0]
    assert isinstance(rows.teacher, HiddenTeacher)
    normed = head.normed(rows.features)[:-1][rows.loss_mask[1:]]  # stored row t teaches x_{t+1}
    assert len(normed) > 5
    torch.testing.assert_close(normed, rows.teacher.hidden.float(), atol=0.05, rtol=0.02)  # rounded to bfloat16


def test_conversations_learned_by_heart(tiny_target: Target, samples: list[TokenSample], tmp_path: Path) -> None:
    few = [replace(sample, id=f"m{i}") for i, sample in enumerate(samples[6:12])]
    store = make_store(tiny_target, few, tmp_path / "features")
    config = train_config(
        steps=150, step_tokens=256, validation_conversations=0, checkpoint_every=200, log_every=50,
        optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    summary = Trainer(store, MedusaMethod(METHOD), METHOD, config, tmp_path / "run", 0).run(NoProgress(), "tiny", {})
    assert summary["steps"] == 150
    head = load_head(tmp_path / "run" / "head", tiny_target)
    for policy in (Chain(depth=3), StaticTree.full(2, 1, 1)):
        decoder = SpeculativeDecoder(tiny_target, head, policy)
        lengths: list[int] = []
        for sample in few:
            # The first draft follows the answer's first token, so it is of the third on.
            made = decoder.generate(sample.input_ids[:PROMPT], len(sample.input_ids) - PROMPT)
            assert made.token_ids == sample.input_ids[PROMPT:]
            lengths += made.accepted_lengths[:-1]  # the last pass is cut by the length limit
        assert sum(lengths) / len(lengths) >= 0.9 * 4
