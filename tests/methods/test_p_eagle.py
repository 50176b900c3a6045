"""P-EAGLE: all depths in one pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafted_rows import (
    CPU,
    DRAFT_TOKENS,
    Drafts,
    causal,
    check_batch_drafts_as_alone,
    check_by_heart,
    check_drafts_as_trained,
    check_loss,
    check_no_leak,
    check_packing,
    learn_by_heart,
    make_batch,
    naive_loss,
    top_k_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sstf.errors import ConfigError, HeadError
from sstf.heads import PEagleHead
from sstf.heads.rollout import attend_reference
from sstf.losses import CrossEntropy, Kl, LkHybrid, Objective
from sstf.methods import PEagleConfig, TrainableMethod, build_method
from sstf.methods.base import News
from sstf.methods.checkpoint import bind, read_head, save_head
from sstf.methods.p_eagle import PEagleMethod, sampled
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, DraftContext, Drawing, DynamicTree, StaticTree
from sstf.types import FeatureBatch

DEPTH = 4
TAPS = 192


def make_method(**changes: object) -> PEagleMethod:
    return PEagleMethod(PEagleConfig.model_validate({"depth": DEPTH, "draft_vocab_size": 150} | changes))


def random_head(target: Target, draft_tokens: Tensor = DRAFT_TOKENS, **changes: object) -> PEagleHead:
    torch.manual_seed(1)
    found = make_method(**changes).build_head(target.spec, target.frozen_head, draft_tokens)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.12)
        found.mask_hidden.normal_()
    return found


def sown(batch: FeatureBatch, seed: int = 0) -> FeatureBatch:
    return replace(batch, seeds=tuple(range(seed, seed + len(batch.lengths))))


# ---- configuration and head ------------------------------------------------------------------------------------------


def test_is_a_trainable_method_of_bounded_depth(tiny_target: Target) -> None:
    method = build_method(PEagleConfig(depth=5))
    assert isinstance(method, TrainableMethod)
    assert (method.limits.depth, method.limits.trees, method.positions) == (5, True, 5)
    assert method.feature_spec(tiny_target.spec).layers == (1, 3, 4)
    # 1 + 0.8 + 0.64 + 0.512 + 0.41 rows for each that is learned from; with the floor 1 + 0.5 + 0.5.
    assert method.unrolls == 4
    assert make_method(depth=3, cod_retain=0.1, cod_floor=0.5).unrolls == 2


def test_mask_tokens(tiny_target: Target) -> None:
    assert random_head(tiny_target).mask_token == 299
    assert random_head(tiny_target, mask_token_id=7).mask_token == 7
    with pytest.raises(ConfigError, match=r"method\.mask_token_id is 300; target tiny has the tokens 0 to 299"):
        make_method(mask_token_id=300).feature_spec(tiny_target.spec)
    with pytest.raises(ConfigError, match=r"has layers 0 to 7, cannot read \[0, 9\]"):
        make_method(layers=(0, 9)).feature_spec(tiny_target.spec)


def test_state_dict_has_the_names_that_vllm_reads(tiny_target: Target) -> None:
    state = random_head(tiny_target).state_dict()
    assert state["mask_hidden"].shape == (192,)
    assert {name.split(".")[0] for name in state} == {
        "mask_hidden", "fc", "midlayer", "layers", "norm", "lm_head", "d2t", "t2d",
    }  # fmt: skip


# ---- which rows are drawn --------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    trained=st.sampled_from([0.0, 0.4, 1.0]),
    retain=st.floats(0.1, 1.0),
    floor=st.floats(0.0, 1.0),
    seed=st.integers(0, 1 << 70),
)
def test_depths_are_drawn_one_inside_the_other(
    lengths: list[int], trained: float, retain: float, floor: float, seed: int
) -> None:
    shares = make_method(cod_retain=retain, cod_floor=floor).shares
    assert shares == [max(retain**depth, floor) for depth in range(DEPTH)]
    valid = torch.rand(DEPTH, sum(lengths), generator=torch.Generator().manual_seed(seed % 99)) < trained
    seeds = [seed + i for i in range(len(lengths))]
    kept = sampled(valid, lengths, seeds, shares)
    assert bool(kept[0].all())
    start = 0
    for length, own in zip(lengths, seeds, strict=True):
        here = slice(start, start + length)
        start += length
        able = valid[1:, here].any(0)
        for depth in range(1, DEPTH):
            assert int(kept[depth, here].sum()) == math.ceil(shares[depth] * int(able.sum()))
            assert not bool((kept[depth, here] & ~able).any())
            if depth > 1:
                assert not bool((kept[depth, here] & ~kept[depth - 1, here]).any())
        # What is drawn depends on the document and its seed alone.
        assert torch.equal(sampled(valid[:, here], [length], [own], shares), kept[:, here])
    assert bool(sampled(valid, lengths, [], shares).all())


def test_other_seeds_draw_other_rows() -> None:
    valid = torch.ones(DEPTH, 200, dtype=torch.bool)
    one, other = (sampled(valid, [200], [seed], make_method(cod_retain=0.5).shares) for seed in (1, 2))
    assert not torch.equal(one[1], other[1])
    assert one.sum(1).tolist() == [200, 100, 50, 40]  # a half, a quarter, and the floor of a fifth


# ---- loss ------------------------------------------------------------------------------------------------------------


def drafts_of(head: PEagleHead) -> Drafts:
    layers = [head.midlayer, *head.later_layers]

    def drafts(document: FeatureBatch, t: int) -> Tensor:
        mask = head.fc(head.mask_hidden).expand(DEPTH - 1, -1)
        g = torch.cat([head.fc(document.features[: t + 1]), mask])
        tokens = torch.cat([document.input_ids[: t + 1], torch.full((DEPTH - 1,), head.mask_token)])
        out = causal(layers, head.embeddings[tokens], g, head.rope(torch.arange(t + DEPTH)))
        return F.rms_norm(out[t:], (64,), head.norm.weight, 1e-6)

    return drafts


@pytest.mark.parametrize(
    ("layers", "objective", "drawn"),
    [(1, Kl(), False), (2, Kl(), False), (2, Kl(), True), (3, LkHybrid(), True), (2, CrossEntropy(), True)],
)
def test_loss_as_a_naive_loop(layers: int, objective: Objective, drawn: bool, tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    method = make_method(num_layers=layers, decay=0.9, cod_retain=0.7, mask_token_id=5)
    method.config = method.config.model_copy(update={"objective": objective})
    head = random_head(tiny_target, num_layers=layers, mask_token_id=5)
    batch = make_batch(frozen, (14, 1, 4, 9), TAPS, 0.95)
    whole = torch.ones(DEPTH, 28, dtype=torch.bool)
    kept = whole
    if drawn:
        batch = sown(batch, 3)
        supervised = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
        valid = torch.zeros_like(whole)
        for start, length in zip((0, 14, 15, 19), batch.lengths, strict=True):
            for depth in range(min(DEPTH, length)):
                valid[depth, start : start + length - depth] = supervised[start + depth : start + length]
        kept = sampled(valid, batch.lengths, batch.seeds, method.shares)
        assert 0 < int((valid & kept).sum()) < int(valid.sum())
    places = kept.split(batch.lengths, 1)
    expected = naive_loss(
        batch, frozen, DRAFT_TOKENS, head.lm_head.weight, drafts_of(head), objective, [0.9**i for i in range(DEPTH)],
        taught=lambda document, position, row: bool(places[document][position, row]),
    )  # fmt: skip
    check_loss(method.loss(head, batch, frozen), expected, head)


def test_a_head_that_is_not_in_training_is_tried_everywhere(tiny_target: Target) -> None:
    frozen, method, head = tiny_target.frozen_head, make_method(), random_head(tiny_target)
    batch = sown(make_batch(frozen, (20, 9), TAPS, 1.0))
    everything = method.loss(head, replace(batch, seeds=()), frozen)
    some, judged = method.loss(head, batch, frozen), method.loss(head.eval(), batch, frozen)
    assert torch.equal(judged.loss, everything.loss) and torch.equal(judged.chain_hits, everything.chain_hits)
    assert float(some.valid[1]) < float(everything.valid[1]) and some.chain_hits.shape[1] < judged.chain_hits.shape[1]


def test_attention_by_its_definition(tiny_target: Target) -> None:
    head = random_head(tiny_target, num_layers=3)
    batch, generator = make_batch(tiny_target.frozen_head, (7, 1, 12), TAPS), torch.Generator().manual_seed(0)
    rows = torch.randperm(20, generator=generator)
    depths = [rows[:11].sort().values, rows[3:17].sort().values, rows[5:9].sort().values, rows[5:6]]
    outs = [
        head.draft(batch.features, batch.input_ids, batch.lengths, depths, *how) for how in ((), (attend_reference,))
    ]
    assert outs[0].shape == (11 + 14 + 4 + 1, 64)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), [head.mask_hidden, head.fc.weight]) for out in outs]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5 * float(other.abs().max()), rtol=0)


def test_bfloat16_stays_near_float32(tiny_target: Target) -> None:
    frozen, method, head = tiny_target.frozen_head, make_method(), random_head(tiny_target)
    batch = sown(make_batch(frozen, (40, 20), TAPS, 1.0))
    exact = method.loss(head, batch, frozen).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = method.loss(head, batch, frozen).loss
    torch.testing.assert_close(low, exact, rtol=0.02, atol=0)
    for grad in torch.autograd.grad(low, list(head.parameters())):
        assert grad.dtype == torch.float32 and bool(grad.isfinite().all())


def test_top_k_teaches_the_same_when_nothing_is_left_out(tiny_target: Target) -> None:
    frozen, method, head = tiny_target.frozen_head, make_method(), random_head(tiny_target)
    batch = sown(make_batch(frozen, (11, 4, 8), TAPS, 0.9))
    one, other = method.loss(head, batch, frozen), method.loss(head, top_k_of(batch, frozen, 300), frozen)
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("lengths", [(11, 4, 8), (1, 1, 13), (2, 9)])
def test_packed_is_the_sum_of_its_documents(lengths: tuple[int, ...], drawn: bool, tiny_target: Target) -> None:
    batch = make_batch(tiny_target.frozen_head, lengths, TAPS, 0.9)
    head = random_head(tiny_target)
    check_packing(make_method(), head, sown(batch) if drawn else batch, tiny_target.frozen_head)


def test_the_future_is_not_seen(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    check_no_leak(make_method(), random_head(tiny_target), make_batch(frozen, (13,), TAPS, 0.9), frozen)


def test_nothing_to_learn_from(tiny_target: Target) -> None:
    head, batch = random_head(tiny_target), sown(make_batch(tiny_target.frozen_head, (4, 2), TAPS, 0.0))
    found = make_method().loss(head, batch, tiny_target.frozen_head)
    assert found.loss.tolist() == 0 and found.valid.tolist() == [0.0] * DEPTH and found.chain_hits.shape == (DEPTH, 0)
    for grad in torch.autograd.grad(found.loss, list(head.parameters())):
        assert not bool(grad.any()) and bool(grad.isfinite().all())


# ---- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_trained_is_what_is_drafted(layers: int, tiny_target: Target) -> None:
    method = make_method(num_layers=layers)
    check_drafts_as_trained(method, random_head(tiny_target, num_layers=layers), tiny_target.frozen_head, TAPS)


@pytest.mark.parametrize(
    "policy", [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
)
def test_a_batch_drafts_what_each_sequence_drafts_alone(policy: AnyTree, tiny_target: Target) -> None:
    check_batch_drafts_as_alone(make_method(), random_head(tiny_target), policy, TAPS)


@torch.no_grad()
def test_children_of_a_level_are_drawn_from_its_distribution(tiny_target: Target) -> None:
    """Whatever the parent: `draft_probs` of a drawn tree are the logits of the depths, put on the target's ids."""
    method, head = make_method(), random_head(tiny_target)
    batch = make_batch(tiny_target.frozen_head, (9,), TAPS)
    drafter = method.drafter(head, CPU)
    drafter.start(1, 64)
    drawing = Drawing(1.0, 1.0, 0, [torch.Generator().manual_seed(0)], 300)
    policy = StaticTree.full(2, 3).model_copy(update={"draw": "iid"})
    news = News(0, batch.input_ids.tolist(), batch.features)
    (tree,) = drafter.propose([news], policy, DraftContext(9, drawing=drawing))
    states = drafts_of(head)(batch, 8)
    probs = torch.softmax(head.lm_head(states), -1)
    assert tree.draft_probs is not None
    for row in (0, *(node + 1 for node, parent in enumerate(tree.parents.tolist()) if parent == -1)):
        depth = 0 if row == 0 else 1
        torch.testing.assert_close(tree.draft_probs[row, DRAFT_TOKENS], probs[depth], atol=1e-4, rtol=1e-3)
    assert bool((tree.draft_probs[:, 1::2] == 0).all())


def test_texts_learned_by_heart_are_drafted(tiny_target: Target, tmp_path: Path) -> None:
    config = PEagleConfig(depth=3, draft_vocab_size=None)
    head, samples = learn_by_heart(
        PEagleMethod(config), config, tiny_target, tmp_path, 150, kind="muon", learning_rate=2e-2
    )
    for policy in (Chain(depth=3), DynamicTree(depth=3, top_k=2, total_tokens=7)):
        check_by_heart(head, samples, tiny_target, policy, 3.4)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(tiny_target: Target, tmp_path: Path) -> None:
    head, config = random_head(tiny_target), make_method().config
    save_head(tmp_path, config, head, tiny_target.spec, {})
    stored = read_head(tmp_path)
    assert stored.config == config
    for name, tensor in bind(stored, tiny_target.frozen_head).state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name]), name
    deeper = replace(stored, config=config.model_copy(update={"num_layers": 3}))
    with pytest.raises(HeadError, match="do not fit method p_eagle"):
        bind(deeper, tiny_target.frozen_head)
