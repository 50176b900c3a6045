from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import (
    SLOTS,
    Draft,
    a_batch_drafts_what_each_drafts_alone,
    block_outcomes,
    compare,
    drafted_chains,
    make_batch,
    naive,
    packed_is_the_sum,
    random_head,
    self_fed_chain,
    with_hits,
)
from torch import Tensor

from sstf.methods import DFlashConfig, DominoConfig, TrainableMethod, build_method
from sstf.methods.base import DraftLimits, News
from sstf.methods.checkpoint import bind, read_head, save_head
from sstf.methods.domino import DominoMethod
from sstf.targets import Target
from sstf.trees import Chain, DraftContext, DynamicTree, StaticTree

SETTINGS = {
    "block_size": SLOTS, "num_layers": 2, "draft_vocab_size": 150, "layers": (0, 3, 6), "gru_size": 20, "rank": 12,
}  # fmt: skip


def make_method(**changes: object) -> DominoMethod:
    return DominoMethod(DominoConfig.model_validate(SETTINGS | changes))


def test_what_it_offers() -> None:
    method = build_method(DominoConfig(block_size=6, num_layers=1))
    assert isinstance(method, TrainableMethod)
    assert (method.positions, method.limits) == (5, DraftLimits(depth=5))


def test_begins_as_dflash(tiny_target: Target) -> None:
    """The correction is nothing yet."""
    head = make_method().build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    assert float(head.correction.detach().abs().max()) == 0
    assert float(head.embed_proj[0].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weights", ["exponential", "d_pace"])
def test_loss_as_a_naive_loop(progress: float, weights: str, tiny_target: Target) -> None:
    """(1 - lambda) corrected + lambda uncorrected, lambda = 1 - progress; weights and figures of the corrected."""
    method, frozen = make_method(weights={"kind": weights}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = replace(with_hits(head, make_batch(frozen, (11, 4, 1, 8), trained=0.9)), progress=progress)

    def loss(block: list[Draft]) -> Tensor:
        chances = {one.position: float(one.log_probs[one.kept.argmax()].exp().detach()) for one in block}
        reached, product = {}, 1.0
        for position, chance in chances.items():
            product *= 0.5 * chance + 0.5
            reached[position] = product
        total = torch.zeros((), dtype=torch.float64)
        for one in block:
            label = one.kept.argmax()
            weight = math.exp(-one.position / 4)
            if weights == "d_pace":
                weight = sum(value for j, value in reached.items() if j >= one.position)
            total = total - weight * (progress * one.log_probs[label] + (1 - progress) * one.base_log_probs[label])
        return total

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


def test_kl_as_a_naive_loop(tiny_target: Target) -> None:
    method, frozen = make_method(objective={"kind": "lk_hybrid"}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (9, 6)))

    def loss(block: list[Draft]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for one in block:
            target_probs = one.kept / one.kept.sum()
            divergence = (target_probs * (target_probs.log() - one.log_probs)).sum()
            value = method.config.objective.losses(divergence, one.overlap)
            total = total + math.exp(-one.position / 4) * value
        return total

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


@pytest.mark.parametrize(("lengths", "seed"), [((3, 1, 9), 0), ((14, 2), 1), ((5, 5, 5, 1), 2)])
def test_packed_is_the_sum_of_its_documents(lengths: tuple[int, ...], seed: int, tiny_target: Target) -> None:
    method, frozen = make_method(anchors=4), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    packed_is_the_sum(method, head, replace(make_batch(frozen, lengths, 0.8, seed), progress=0.4), frozen)


@torch.no_grad()
def test_drafts_what_was_trained(tiny_target: Target) -> None:
    """Where a chain's drafts are the text's, its next draft is the best of what the loss computes there; and every
    chain is that of the reference, which feeds itself."""
    method = make_method()
    head = random_head(method, tiny_target)
    batch = replace(make_batch(tiny_target.frozen_head, (19,)), loss_mask=torch.ones(19, dtype=torch.bool))
    # The drafts of row 4 become the text, one after the other.
    for i in range(1, SLOTS - 1):
        batch.input_ids[4 + i] = self_fed_chain(head, batch, 4)[i - 1]
    best = head.draft_tokens[block_outcomes(method, head, batch, tiny_target.frozen_head).argmax(-1)].tolist()
    for rows in (range(19), (0, 4, 5, 11, 18), (18,)):
        chains = drafted_chains(method.drafter(head, torch.device("cpu")), batch, rows)
        assert chains == [self_fed_chain(head, batch, row) for row in rows]
        assert [chain[0] for chain in chains] == [best[row][0] for row in rows]
        if 4 in rows:
            assert chains[list(rows).index(4)] == best[4]
    # The correction is at work: without it the chains are others.
    plain = head.draft_tokens[(head.fill(batch.features, batch.input_ids, (19,), [4]) @ head.lm_head.T).argmax(-1)]
    assert plain[0].tolist() != best[4]


@torch.no_grad()
def test_each_path_of_a_tree_is_corrected_by_itself(tiny_target: Target) -> None:
    """Confidences of a tree's nodes are those of the reference along their paths."""
    method = make_method()
    head = random_head(method, tiny_target)
    batch = make_batch(tiny_target.frozen_head, (8,))
    drafter = method.drafter(head, torch.device("cpu"))
    drafter.start(1, 64)
    news = News(0, batch.input_ids.tolist(), batch.features)
    (tree,) = drafter.propose([news], StaticTree.full(3, 2, 2), DraftContext(9))
    hidden = head.fill_reference(batch.features, batch.input_ids, (8,), [7])[0]
    paths: list[list[int]] = []
    assert tree.confidence is not None
    for token, parent, confidence in zip(
        tree.tokens.tolist(), tree.parents.tolist(), tree.confidence.tolist(), strict=True
    ):
        path = paths[parent] if parent >= 0 else []
        states = head.paths(torch.tensor([[int(batch.input_ids[7]), *path]]))[0, -1]
        logits = hidden[len(path)] @ head.lm_head.T + head.correction @ head.low_rank(hidden[len(path)], states)
        chance = torch.softmax(logits, -1)[head.draft_tokens == token]
        assert float(chance) == pytest.approx(confidence, rel=1e-4)
        paths.append([*path, token])


@torch.no_grad()
def test_a_batch_drafts_what_each_sequence_drafts_alone(tiny_target: Target) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    policies = [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
    a_batch_drafts_what_each_drafts_alone(lambda: method.drafter(head, torch.device("cpu")), policies)


def test_a_saved_head_loads_back(tiny_target: Target, tmp_path: Path) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    save_head(tmp_path, method.config, head, tiny_target.spec, {})
    stored = read_head(tmp_path)
    assert stored.config == method.config != DFlashConfig()
    again = bind(stored, tiny_target.frozen_head)
    batch = make_batch(tiny_target.frozen_head, (9, 5))
    one, other = (method.loss(some, batch, tiny_target.frozen_head).loss for some in (head, again))
    assert torch.equal(one, other)
