from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import (
    EVEN,
    SLOTS,
    Draft,
    a_batch_drafts_what_each_drafts_alone,
    block_outcomes,
    compare,
    documents,
    drafted_chains,
    make_batch,
    naive,
    packed_is_the_sum,
    random_head,
    self_fed_chain,
    with_hits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import ConfigError
from sstf.features import FeatureSpec
from sstf.methods import DFlashConfig, TrainableMethod, build_method
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits
from sstf.methods.block import default_layers, draw_blocks
from sstf.methods.checkpoint import bind, read_head, save_head
from sstf.methods.dflash import DFlashMethod
from sstf.targets import Target
from sstf.trees import Chain, DynamicTree, StaticTree
from sstf.types import FeatureBatch

SETTINGS = {"block_size": SLOTS, "num_layers": 2, "draft_vocab_size": 150, "layers": (0, 3, 6)}


def make_method(**changes: object) -> DFlashMethod:
    return DFlashMethod(DFlashConfig.model_validate(SETTINGS | changes))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_what_it_offers(tiny_target: Target) -> None:
    method = build_method(DFlashConfig(block_size=6, num_layers=1))
    assert isinstance(method, TrainableMethod)
    assert (method.positions, method.limits, method.draft_vocab_size) == (5, DraftLimits(depth=5), WHOLE_VOCABULARY)
    assert make_method().draft_vocab_size == 150
    # round(1 + i (8 - 4) / 4)
    assert make_method(layers=None).feature_spec(tiny_target.spec) == FeatureSpec((1, 2, 3, 4, 5))
    assert make_method(layers=(6, 2)).feature_spec(tiny_target.spec) == FeatureSpec((2, 6))
    head = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    assert head.lm_head is tiny_target.frozen_head.lm_head  # shared, not copied


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(36, (1, 9, 17, 25, 33)), (28, (1, 7, 13, 19, 25)), (8, (1, 2, 3, 4, 5)), (5, (1, 2)), (4, (2,)), (1, (0,))],
)
def test_default_layers(depth: int, layers: tuple[int, ...]) -> None:
    """Those of the published checkpoints for Qwen3-8B and 1.7B; fewer where they would not differ."""
    assert default_layers(depth) == layers


def test_settings_that_contradict_the_target(tiny_target: Target) -> None:
    with pytest.raises(ConfigError, match=r"method.layers: target tiny has layers 0 to 7, cannot read \[0, 8\]"):
        make_method(layers=(0, 8)).feature_spec(tiny_target.spec)
    with pytest.raises(ConfigError, match="mask_token_id is 300, target tiny has tokens 0 to 299"):
        make_method(mask_token_id=300).feature_spec(tiny_target.spec)
    for wrong in ({"block_size": 1}, {"anchors": 0}, {"weights": {"kind": "d_pace", "floor": 2}}, {"layers": ()}):
        with pytest.raises(ValidationError):
            make_method(**wrong)


def test_the_mask_token(tiny_target: Target) -> None:
    """The one asked for, or the one with the smallest embedding that a norm can tell from nothing."""
    frozen = tiny_target.frozen_head
    embeddings = frozen.embeddings.clone()
    assert float(embeddings[0].abs().max()) == 0  # of padding
    embeddings[77] /= 3
    small = replace(frozen, embeddings=embeddings)
    assert int(make_method().build_head(tiny_target.spec, small, EVEN).mask_token) == 77
    head = make_method(mask_token_id=5).build_head(tiny_target.spec, frozen, EVEN)
    assert int(head.mask_token) == 5
    assert torch.equal(head.block(torch.tensor(8)), frozen.embeddings[[8, 5, 5, 5, 5]])


# ---- loss ------------------------------------------------------------------------------------------------------------


def exponential(gamma: float) -> list[float]:
    return [math.exp(-i / gamma) for i in range(SLOTS)]


def test_loss_as_a_naive_loop(tiny_target: Target) -> None:
    method, frozen = make_method(weights={"kind": "exponential", "gamma": 3.0}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (11, 4, 1, 8), trained=0.9))

    def loss(block: list[Draft]) -> Tensor:
        # The label is the best token of what the target gives the draft vocabulary, whatever `teacher_token` says.
        return sum(
            (exponential(3.0)[one.position] * -one.log_probs[one.kept.argmax()] for one in block), torch.zeros(())
        )

    found = method.loss(head, batch, frozen)
    compare(found, naive(head, batch, frozen, loss), head)
    assert found.chain_hits.shape[1] > 0
    # A teacher outside the draft vocabulary was met, and is not valid; blocks end with their document.
    assert float(batch.loss_mask.sum()) > float(found.valid[0]) > float(found.valid[-1]) > 0


def test_d_pace_as_a_naive_loop(tiny_target: Target) -> None:
    """w_i = sum of C_j for j >= i, C_j = product of (1 - a) q + a up to j; no gradient through it."""
    floor = 0.3
    method, frozen = make_method(weights={"kind": "d_pace", "floor": floor}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (11, 4, 8), trained=0.8))

    def loss(block: list[Draft]) -> Tensor:
        chances = {one.position: float(one.log_probs[one.kept.argmax()].exp().detach()) for one in block}
        reached, product = {}, 1.0
        for position in sorted(chances):
            product *= (1 - floor) * chances[position] + floor
            reached[position] = product
        return sum(
            (
                -one.log_probs[one.kept.argmax()] * sum(c for j, c in reached.items() if j >= one.position)
                for one in block
            ),
            torch.zeros(()),
        )

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


@pytest.mark.parametrize("objective", ["kl", "tv", "lk_alpha", "lk_hybrid"])
def test_every_objective(objective: str, tiny_target: Target) -> None:
    method, frozen = make_method(objective={"kind": objective}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (9, 5)))

    def loss(block: list[Draft]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for one in block:
            target_probs = one.kept / one.kept.sum()
            divergence = (target_probs * (target_probs.log() - one.log_probs)).sum()
            value = method.config.objective.losses(divergence, one.overlap)
            total = total + exponential(4.0)[one.position] * value
        return total

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
    trained=st.sampled_from([0.1, 0.5, 1.0]),
    anchors=st.sampled_from([2, 5, 512]),
    seed=st.integers(0, 99),
)
def test_packed_is_the_sum_of_its_documents(
    tiny_target: Target, lengths: tuple[int, ...], trained: float, anchors: int, seed: int
) -> None:
    """Also which anchors are drawn."""
    method, frozen = make_method(anchors=anchors, weights={"kind": "d_pace"}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    packed_is_the_sum(method, head, make_batch(frozen, lengths, trained, seed), frozen)


def test_anchors_are_drawn_by_the_seed(tiny_target: Target) -> None:
    batch = make_batch(tiny_target.frozen_head, (40, 30), trained=0.6)

    def rows(one: FeatureBatch, anchors: int = 5) -> list[int]:
        return draw_blocks(one, one.loss_mask, 4, anchors).rows

    drawn = rows(batch)
    trained = batch.loss_mask.nonzero()[:, 0].tolist()
    assert len(drawn) == 10 and sum(row < 40 for row in drawn) == 5
    assert set(drawn) < set(trained) and drawn == sorted(drawn)
    assert rows(batch) == drawn
    assert rows(replace(batch, seeds=(1, 2))) != drawn
    first, second = documents(batch)
    assert rows(first) + [row + 40 for row in rows(second)] == drawn
    assert rows(batch, 512) == trained == rows(replace(batch, seeds=()))


# ---- drafting --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drafts_what_was_trained(tiny_target: Target) -> None:
    """The drafter's chain behind every row, reading on in steps of any size, is the best of what the loss computes."""
    method = make_method()
    head = random_head(method, tiny_target)
    batch = replace(make_batch(tiny_target.frozen_head, (19,)), loss_mask=torch.ones(19, dtype=torch.bool))
    best = head.draft_tokens[block_outcomes(method, head, batch, tiny_target.frozen_head).argmax(-1)].tolist()
    for rows in (range(19), (0, 4, 5, 11, 18), (18,)):
        chains = drafted_chains(method.drafter(head, torch.device("cpu")), batch, rows)
        assert chains == [best[row] for row in rows] == [self_fed_chain(head, batch, row) for row in rows]


@torch.no_grad()
def test_hits_of_the_loss_are_accepted_drafts(tiny_target: Target) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    batch = make_batch(tiny_target.frozen_head, (17,), trained=1.0)
    batch = with_hits(head, batch)
    found = method.loss(head, batch, tiny_target.frozen_head).chain_hits
    whole = 17 - (SLOTS - 1) + 1
    chains = drafted_chains(method.drafter(head, torch.device("cpu")), batch, range(whole))
    hits = [[chain[i] == int(batch.teacher_token[t + i]) for i in range(SLOTS - 1)] for t, chain in enumerate(chains)]
    assert found.T.tolist() == hits and found.any()


@torch.no_grad()
def test_a_batch_drafts_what_each_sequence_drafts_alone(tiny_target: Target) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    policies = [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2), Chain(depth=2)]
    a_batch_drafts_what_each_drafts_alone(lambda: method.drafter(head, torch.device("cpu")), policies)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_saved_head_loads_back(tiny_target: Target, tmp_path: Path) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    head.mask_token.fill_(9)  # what was trained with stays
    save_head(tmp_path, method.config, head, tiny_target.spec, {})
    stored = read_head(tmp_path)
    assert stored.config == method.config and stored.layers == (0, 3, 6)
    again = bind(stored, tiny_target.frozen_head)
    batch = make_batch(tiny_target.frozen_head, (9, 5))
    one, other = (method.loss(some, batch, tiny_target.frozen_head).loss for some in (head, again))
    assert torch.equal(one, other)
    assert not any("lm_head" in name or "embed" in name for name in stored.tensors)
