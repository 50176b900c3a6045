"""The draft vocabulary by counts and by the target's probabilities, against a naive reference; in a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_store import make_store, own_answers, pinned_target, train_config
from transformers import PreTrainedTokenizerBase

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, OnlineFeatures, TopKSignal, extract
from sstf.features.vocabulary import teacher_mass, token_counts
from sstf.methods import Eagle3Config, Eagle3Method
from sstf.targets import Target
from sstf.targets.draft_vocab import choose_draft_vocab, coverage
from sstf.train.trainer import Trainer
from sstf.types import TokenSample

SMALL = Eagle3Config(ttt_steps=2, draft_vocab_size=40)


@pytest.fixture
def target(tokenizer: PreTrainedTokenizerBase) -> Target:
    return pinned_target(tokenizer)


@pytest.fixture
def samples(target: Target) -> list[TokenSample]:
    return own_answers(target, 12)


def by_hand(target: Target, samples: list[TokenSample]) -> torch.Tensor:
    """Position t teaches token t + 1; a head can draft x_2 at the earliest."""
    mass = torch.zeros(target.spec.vocab_size, dtype=torch.float64)
    for sample in samples:
        probs = torch.softmax(target.model(torch.tensor([sample.input_ids]), use_cache=False).logits[0].double(), -1)
        for t in range(1, len(sample.input_ids) - 1):
            if sample.loss_mask[t + 1]:
                mass += probs[t]
    return mass


def test_mass_is_the_sum_of_the_targets_probabilities(
    target: Target, samples: list[TokenSample], tmp_path: Path
) -> None:
    expected = by_hand(target, samples)
    online = OnlineFeatures(target, samples, Eagle3Method(SMALL).feature_spec(target.spec), ExtractConfig())
    stored = make_store(target, samples, tmp_path / "hidden")
    for source in (online, stored):
        found, used = teacher_mass(source, source.frozen_head(), range(len(samples)))
        assert used == len(samples)
        # The states are rounded to bfloat16, the sums are of some 180 positions.
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    extract(
        target,
        samples,
        Eagle3Method(SMALL).feature_spec(target.spec),
        ExtractConfig(teacher=TopKSignal(k=300)),
        tmp_path / "topk",
        NoProgress(),
    )
    top = FeatureStore(tmp_path / "topk")
    torch.testing.assert_close(
        teacher_mass(top, top.frozen_head(), range(len(samples)))[0], expected, atol=2e-2, rtol=2e-2
    )
    # Whole conversations: 10 trained positions, then 11.
    few, used = teacher_mass(online, online.frozen_head(), range(len(samples)), rows=11)
    assert used == 2 and float(few.sum()) == pytest.approx(21)


def test_counts(target: Target) -> None:
    samples = [TokenSample("a", [5, 6, 6, 7], [False, True, True, False]), TokenSample("b", [6, 9, 9], [False] * 3)]
    online = OnlineFeatures(target, samples, Eagle3Method(SMALL).feature_spec(target.spec), ExtractConfig())
    counts = token_counts(online, [0, 1])
    assert counts[6] == 2 and counts.sum() == 2


def test_a_vocabulary_by_mass_loses_less(target: Target, samples: list[TokenSample], tmp_path: Path) -> None:
    store = make_store(target, samples, tmp_path / "store")
    lost = {}
    for how in ("frequency", "mass"):
        config = train_config(draft_vocab=how, steps=2)
        trainer = Trainer(store, Eagle3Method(SMALL), SMALL, config, tmp_path / how, 0)
        assert len(trainer.module.head.draft_tokens) == 40
        lost[how] = trainer.vocabulary["draft_vocab_lost_mass"]
        summary = trainer.run(NoProgress(), "tiny", {})
        assert summary["draft_vocab_lost_mass"] == lost[how]
        chosen = trainer.module.head.draft_tokens
        again = Trainer(store, Eagle3Method(SMALL), SMALL, config, tmp_path / how, 0)
        assert torch.equal(again.module.head.draft_tokens, chosen)
        held_out = [samples[i] for i in again.held_out]
        assert lost[how] == pytest.approx(1 - coverage(by_hand(target, held_out), chosen), abs=5e-3)
    assert lost["mass"] < lost["frequency"]


def test_the_best_vocabulary_for_given_sums() -> None:
    mass = torch.tensor([0.1, 3.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    assert choose_draft_vocab(mass, 3, then=torch.tensor([0, 0, 0, 9, 0])).tolist() == [0, 1, 4]
    assert choose_draft_vocab(mass, 4, then=torch.tensor([0, 0, 0, 9, 0])).tolist() == [0, 1, 3, 4]
