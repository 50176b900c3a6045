from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import (
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
from pydantic import ValidationError
from torch import Tensor

from sstf.heads import DSparkHead
from sstf.losses import Mixed
from sstf.methods import DSparkConfig, TrainableMethod, build_method
from sstf.methods.base import DraftLimits, News
from sstf.methods.checkpoint import bind, read_head, save_head
from sstf.methods.dspark import DSparkMethod, verified
from sstf.targets import Target
from sstf.trees import Chain, DraftContext, DynamicTree, StaticTree
from sstf.trees.calibration import PathCalibration

DRAFTS = 4
SETTINGS = {
    "block_size": DRAFTS, "num_layers": 2, "draft_vocab_size": 150, "layers": (0, 3, 6), "rank": 12,
    "verify_above": 0.0,
}  # fmt: skip


def make_method(**changes: object) -> DSparkMethod:
    return DSparkMethod(DSparkConfig.model_validate(SETTINGS | changes))


def test_what_it_offers(tiny_target: Target) -> None:
    method = build_method(DSparkConfig())
    assert isinstance(method, TrainableMethod)
    assert (method.positions, method.limits) == (7, DraftLimits(depth=7))
    head = make_method().build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    assert float(head.correction.detach().abs().max()) == 0
    for wrong in ({"verify_above": 1.0}, {"block_size": 0}, {"rank": 0}):
        with pytest.raises(ValidationError):
            make_method(**wrong)


# ---- loss ------------------------------------------------------------------------------------------------------------


def confidence_loss(head: DSparkHead, one: Draft) -> Tensor:
    """Against 1 - ||draft - target||_1 / 2, over the whole vocabulary."""
    outside = 1 - one.kept.sum()  # what the target gives to tokens that cannot be drafted
    distance = (one.log_probs.exp() - one.kept).abs().sum() + outside
    wanted = (1 - distance / 2).detach()
    chance = torch.sigmoid(head.confidence(one.hidden, one.state).double())
    return -(wanted * chance.log() + (1 - wanted) * (1 - chance).log())


@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
def test_loss_as_a_naive_loop(share: float, tiny_target: Target) -> None:
    """0.1 CE + 0.9 L1 + share * BCE, weights exp(-i / gamma)."""
    method = make_method(confidence_weight=share, weights={"kind": "exponential", "gamma": 3.0})
    frozen = tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (11, 4, 1, 8), trained=0.9))

    def loss(block: list[Draft]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for one in block:
            distance = (one.log_probs.exp() - one.kept).abs().sum() + 1 - one.kept.sum()
            value = -0.1 * one.log_probs[one.kept.argmax()] + 0.9 * distance
            total = total + math.exp(-one.position / 3) * (value + share * confidence_loss(head, one))
        return total

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


def test_with_kl_as_a_naive_loop(tiny_target: Target) -> None:
    method, frozen = make_method(objective={"kind": "kl"}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    batch = with_hits(head, make_batch(frozen, (9, 6)))

    def loss(block: list[Draft]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for one in block:
            target_probs = one.kept / one.kept.sum()
            divergence = (target_probs * (target_probs.log() - one.log_probs)).sum()
            total = total + math.exp(-one.position / 4) * (divergence + confidence_loss(head, one))
        return total

    compare(method.loss(head, batch, frozen), naive(head, batch, frozen, loss), head)


@pytest.mark.parametrize(("lengths", "seed"), [((3, 1, 9), 0), ((14, 2), 1), ((5, 5, 5, 1), 2)])
def test_packed_is_the_sum_of_its_documents(lengths: tuple[int, ...], seed: int, tiny_target: Target) -> None:
    method, frozen = make_method(anchors=4, weights={"kind": "d_pace"}), tiny_target.frozen_head
    head = random_head(method, tiny_target)
    packed_is_the_sum(method, head, make_batch(frozen, lengths, 0.8, seed), frozen)


def test_mixed_is_told_from_its_parts() -> None:
    assert DSparkConfig().objective == Mixed(ce=0.1, l1=0.9)


# ---- drafting --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drafts_what_was_trained(tiny_target: Target) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    batch = replace(make_batch(tiny_target.frozen_head, (19,)), loss_mask=torch.ones(19, dtype=torch.bool))
    for i in range(1, DRAFTS):
        batch.input_ids[4 + i] = self_fed_chain(head, batch, 4)[i - 1]
    best = head.draft_tokens[block_outcomes(method, head, batch, tiny_target.frozen_head).argmax(-1)].tolist()
    for rows in (range(19), (0, 4, 5, 11, 18), (18,)):
        chains = drafted_chains(method.drafter(head, torch.device("cpu")), batch, rows)
        assert chains == [self_fed_chain(head, batch, row) for row in rows]
        assert [chain[0] for chain in chains] == [best[row][0] for row in rows]
        if 4 in rows:
            assert chains[list(rows).index(4)] == best[4]


@torch.no_grad()
def test_a_batch_drafts_what_each_sequence_drafts_alone(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experience apart, which a batch shares."""
    monkeypatch.setattr(PathCalibration, "observe", lambda *given: None)
    method = make_method(verify_above=0.3)
    head = random_head(method, tiny_target)
    policies = [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
    a_batch_drafts_what_each_drafts_alone(lambda: method.drafter(head, torch.device("cpu")), policies)


# ---- how much is verified --------------------------------------------------------------------------------------------


class Cost:
    """A pass costs 1 and each node `each`."""

    def __init__(self, each: float) -> None:
        self.each = each

    def best_size(self, gains: list[float], depth: int) -> int:
        rates = [(1 + sum(gains[:n])) / (1 + n * self.each) for n in range(len(gains) + 1)]
        return max(range(len(rates)), key=rates.__getitem__)

    def worth_another_level(self, gains: object, frontier: object, depth: int, keep: float = 1.0) -> bool:
        raise AssertionError


def test_stops_where_it_is_not_confident() -> None:
    assert [verified([0.9, 0.5, 0.2, 0.1], least, None) for least in (0.0, 0.1, 0.15, 0.3, 0.6, 0.95)] == [
        4, 4, 3, 2, 1, 0,
    ]  # fmt: skip


def test_stops_where_expected_tokens_a_second_fall() -> None:
    """(1 + sum of chances) / (1 + n / 4): 1, 1.52, 1.6, 1.49, .. The first fall ends it."""
    assert verified([0.9, 0.5, 0.2, 0.1], 0.0, Cost(0.25)) == 2
    assert verified([0.9, 0.5, 0.2, 0.1], 0.6, Cost(0.25)) == 1
    assert verified([0.2, 0.19], 0.0, Cost(0.25)) == 0


@torch.no_grad()
def test_a_chain_ends_by_its_confidences(tiny_target: Target) -> None:
    """By products of confidences along the drafts, whatever the last draft is; trees stay whole."""
    method = make_method(verify_above=0.25)
    head = random_head(method, tiny_target)
    batch = make_batch(tiny_target.frozen_head, (40,))
    whole = drafted_chains(make_method().drafter(head, torch.device("cpu")), batch, range(40))
    cut = [drafted_chains(method.drafter(head, torch.device("cpu")), batch, [row])[0] for row in range(40)]
    sizes = set()
    for row, (chain, kept) in enumerate(zip(whole, cut, strict=True)):
        hidden = head.fill_reference(batch.features, batch.input_ids, (40,), [row])[0]
        product, size = 1.0, 0
        for i, before in enumerate([int(batch.input_ids[row]), *chain[:-1]]):
            product *= float(head.confidence(hidden[i], head.path_start(torch.tensor(before))).sigmoid())
            if product < 0.25:
                break
            size = i + 1
        assert kept == chain[:size]
        sizes.add(size)
    assert {0, 4} < sizes
    drafter = method.drafter(head, torch.device("cpu"))
    drafter.start(1, 64)
    news = News(0, batch.input_ids.tolist(), batch.features)
    assert len(drafter.propose([news], StaticTree.full(2, 2, 1), DraftContext(9))[0]) == 10


@torch.no_grad()
def test_confidences_are_corrected_by_what_was_accepted(tiny_target: Target) -> None:
    """A head that says .3 of drafts that are always right, and of drafts of which the first is and the second never."""
    head = random_head(make_method(), tiny_target)
    head.confidence_head.proj.weight.zero_()
    head.confidence_head.proj.bias.fill_(math.log(0.3 / 0.7))
    features = torch.randn(400, head.shape.taps, generator=torch.Generator().manual_seed(3))
    for right, expected in ((DRAFTS, DRAFTS), (1, 1)):
        drafter = make_method(verify_above=0.2).drafter(head, torch.device("cpu"))
        drafter.start(1, 400)
        tokens, sizes, read = [7], list[int](), 0
        for _ in range(60):
            news = News(0, tokens, features[read : read + len(tokens)])
            read += len(tokens)
            (tree,) = drafter.propose([news], Chain(depth=DRAFTS), DraftContext(99))
            drafts = tree.tokens.tolist()
            sizes.append(len(drafts))
            tokens = drafts[:right]
            tokens.append((drafts[right] + 1) % 300 if len(drafts) > right else 5)  # the bonus token
        assert sizes[0] == 1  # .3, and .09 is below .2
        assert sizes[-1] == expected, sizes
        first, second = (float(drafter.experience.probabilities(torch.tensor([[0.3]]), depth)) for depth in (1, 2))
        assert first > 0.85
        assert second > 0.85 if right == DRAFTS else second < 0.3


@torch.no_grad()
def test_another_text_in_the_slot_teaches_nothing(tiny_target: Target) -> None:
    head = random_head(make_method(), tiny_target)
    batch = make_batch(tiny_target.frozen_head, (20,))
    drafter = make_method().drafter(head, torch.device("cpu"))
    drafter.start(1, 64)
    news = News(0, batch.input_ids.tolist(), batch.features)
    for _ in range(2):
        drafter.restart(0)
        assert len(drafter.propose([news], Chain(depth=DRAFTS), DraftContext(99))[0]) == DRAFTS
    assert drafter.experience.error().weight == 0
    drafter.propose([News(0, [3], batch.features[:1])], Chain(depth=DRAFTS), DraftContext(99))
    assert drafter.experience.error().weight == 1  # the first draft was reached, no other


def test_a_saved_head_loads_back(tiny_target: Target, tmp_path: Path) -> None:
    method = make_method()
    head = random_head(method, tiny_target)
    save_head(tmp_path, method.config, head, tiny_target.spec, {})
    stored = read_head(tmp_path)
    assert stored.config == method.config
    again = bind(stored, tiny_target.frozen_head)
    batch = make_batch(tiny_target.frozen_head, (9, 5))
    one, other = (method.loss(some, batch, tiny_target.frozen_head).loss for some in (head, again))
    assert torch.equal(one, other)
