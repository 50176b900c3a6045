from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import ConfigError
from sstf.features import FeatureSpec
from sstf.heads import Eagle3Head
from sstf.methods import Eagle3Config, TrainableMethod, build_method, eagle3
from sstf.methods.base import News
from sstf.targets import FrozenHead, Target
from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, StaticTree
from sstf.types import DraftTree, FeatureBatch, StepOutput

DRAFT_TOKENS = torch.arange(0, 300, 2)  # the even half of the vocabulary
STEPS = 4


def make_method(**changes: object) -> eagle3.Eagle3Method:
    return eagle3.Eagle3Method(Eagle3Config.model_validate({"ttt_steps": STEPS, "draft_vocab_size": 150} | changes))


@pytest.fixture
def head(tiny_target: Target) -> Eagle3Head:
    """Random and far from flat."""
    torch.manual_seed(1)
    found = make_method().build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return found


# ---- configuration and start -----------------------------------------------------------------------------------------


def test_layers(tiny_target: Target) -> None:
    """{1, L//2 - 1, L - 4} of L = 8 layers, or those asked for, in ascending order."""
    assert make_method().feature_spec(tiny_target.spec) == FeatureSpec((1, 3, 4))
    assert make_method(layers=(7, 0)).feature_spec(tiny_target.spec) == FeatureSpec((0, 7))
    for wrong in ((0, 8), (-1, 2), (3, 3)):
        with pytest.raises(
            ConfigError, match=r"method.layers: target tiny has layers 0 to 7, cannot read \["
        ) as caught:
            make_method(layers=wrong).feature_spec(tiny_target.spec)
        assert str(list(wrong)) in str(caught.value)


def test_default_layers_of_a_target_that_is_too_shallow(tiny_target: Target) -> None:
    with pytest.raises(ConfigError, match=r"has layers 0 to 3, cannot read \[1, 1, 0\]"):
        make_method().feature_spec(replace(tiny_target.spec, num_layers=4))


def test_is_a_trainable_method() -> None:
    method = build_method(Eagle3Config(draft_vocab_size=77))
    assert isinstance(method, TrainableMethod)
    assert method.draft_vocab_size == 77
    with pytest.raises(ValidationError):
        Eagle3Config(layers=())


def test_head_starts_from_the_target(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    torch.manual_seed(0)
    head = make_method().build_head(tiny_target.spec, frozen, DRAFT_TOKENS)
    assert torch.equal(head.lm_head.weight, frozen.lm_head[::2])
    assert torch.equal(head.norm.weight, frozen.final_norm)
    # fc hands the highest of the three taps on unchanged.
    taps = torch.randn(2, 3 * 64)
    torch.testing.assert_close(head.fc(taps), taps[:, 128:])
    layer = frozen.last_layer
    for name in ("q", "k", "v"):
        weight = getattr(head.midlayer.self_attn, f"{name}_proj").weight
        assert torch.equal(weight[:, 64:], layer[f"self_attn.{name}_proj.weight"])  # [embedding; feature]
    assert torch.equal(head.midlayer.self_attn.o_proj.weight, layer["self_attn.o_proj.weight"])
    assert torch.equal(head.midlayer.mlp.down_proj.weight, layer["mlp.down_proj.weight"])
    assert torch.equal(head.midlayer.hidden_norm.weight, layer["input_layernorm.weight"])


def test_target_of_another_shape_keeps_the_random_start(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    odd = replace(frozen, last_layer={"self_attn.q_proj.weight": torch.zeros(5, 64), "wqkv.weight": torch.zeros(3, 3)})
    torch.manual_seed(0)
    head = make_method().build_head(tiny_target.spec, odd, DRAFT_TOKENS)
    for name, parameter in head.midlayer.named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
    random = make_method(init="random").build_head(tiny_target.spec, frozen, DRAFT_TOKENS)
    assert float(random.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(random.lm_head.weight, frozen.lm_head[::2])


def test_same_seed_same_head(tiny_target: Target) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        method = make_method(init="random")
        return method.build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS).fc.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


# ---- what is trained is what is decoded ------------------------------------------------------------------------------


def drafted(
    head: Eagle3Head, calls: list[tuple[Tensor, Tensor]], fed: list[list[int]], patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Log draft_probs of each level when the drafter is fed `fed[level]` (one node or several), after `calls`."""
    levels: list[Tensor] = []

    def forced(
        policy: object, context: object, first: Tensor, expand: Callable[..., Tensor], draft_tokens: Tensor
    ) -> list[DraftTree]:
        levels[:] = [torch.log_softmax(first, -1)]
        for level, tokens in enumerate(fed):
            # Level 0 hangs at the root; later nodes each continue the node in the same place.
            parents = torch.zeros(len(tokens), dtype=torch.int64) if level == 0 else torch.arange(len(tokens))
            ids = torch.searchsorted(draft_tokens, torch.tensor(tokens))
            assert draft_tokens[ids].tolist() == tokens
            levels.append(torch.log_softmax(expand(parents[None], ids[None])[0], -1))
        return [DraftTree.empty(first.device)]

    drafter = make_method().drafter(head, torch.device("cpu"))
    drafter.start(1, 64)
    with patch.context() as patched:
        patched.setattr(eagle3, "grow", forced)
        for features, tokens in calls:
            drafter.propose([News(0, tokens.tolist(), features)], Chain(), DraftContext(8))
    return levels


def unrolled(head: Eagle3Head, features: Tensor, tokens: Tensor) -> list[Tensor]:
    """Log draft_probs [seq, draft_vocab] of every training step; `tokens` reach STEPS - 1 beyond the features."""
    seq = len(features)
    outs = head.unroll(head.fc(features[None]), [tokens[None, i : i + seq] for i in range(STEPS)])
    return [torch.log_softmax(head.logits(out)[0], -1) for out in outs]


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    """Features of 9 positions, and even tokens (all in the draft vocabulary) that go on beyond."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(9, 192, generator=generator), torch.randint(150, (9 + STEPS,), generator=generator) * 2


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 3, 8])
def test_training_step_is_what_the_decoder_computes(
    head: Eagle3Head, text: tuple[Tensor, Tensor], t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, tokens = text
    trained = unrolled(head, features, tokens)
    fed = [[int(token)] for token in tokens[t + 1 : t + STEPS]]
    decoded = drafted(head, [(features[: t + 1], tokens[: t + 1])], fed, monkeypatch)
    assert len(decoded) == STEPS
    for step in range(STEPS):
        torch.testing.assert_close(decoded[step][0], trained[step][t], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoder_in_several_calls(
    head: Eagle3Head, text: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafted entries of one call must leave no trace in the next."""
    features, tokens = text
    calls = [(features[a:b], tokens[a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    decoded = drafted(head, calls, [[int(token)] for token in tokens[9:12]], monkeypatch)
    for step, levels in enumerate(unrolled(head, features, tokens)):
        torch.testing.assert_close(decoded[step][0], levels[8], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_do_not_see_each_other(
    head: Eagle3Head, text: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, tokens = text
    branches = [[2, 4, 6], [8, 8, 290], [2, 6, 4]]
    fed = [list(level) for level in zip(*branches, strict=True)]
    decoded = drafted(head, [(features, tokens[:9])], fed, monkeypatch)
    for i, branch in enumerate(branches):
        trained = unrolled(head, features, torch.tensor([*tokens[:9].tolist(), *branch]))
        for step in range(1, STEPS):
            torch.testing.assert_close(decoded[step][i], trained[step][8], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_many_positions_in_one_call_or_many(head: Eagle3Head) -> None:
    generator = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(700, 192, generator=generator), torch.randint(300, (700,), generator=generator)
    policy = DynamicTree(depth=3, top_k=3, total_tokens=8)
    drafter = make_method().drafter(head, torch.device("cpu"))
    found = []
    for cuts in ((0, 700), (0, 510, 511, 700)):
        drafter.start(1, 710)
        for start, end in pairwise(cuts):
            (tree,) = drafter.propose(
                [News(0, tokens[start:end].tolist(), features[start:end])], policy, DraftContext(9)
            )
        found.append((tree.tokens.tolist(), tree.parents.tolist()))
    assert found[0] == found[1]
    assert set(found[0][0]) <= set(DRAFT_TOKENS.tolist())


@torch.no_grad()
@pytest.mark.parametrize(
    "policy", [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
)
def test_a_batch_drafts_what_each_sequence_drafts_alone(head: Eagle3Head, policy: AnyTree) -> None:
    """Sequences of different lengths, in changing company; one ends and another takes its slot."""
    generator = torch.Generator().manual_seed(1)
    features, tokens = torch.randn(4, 60, 192, generator=generator), torch.randint(300, (4, 60), generator=generator)
    #           slot, text, from, to
    calls = [
        [(0, 0, 0, 9), (1, 1, 0, 30), (2, 2, 0, 1)],
        [(0, 0, 9, 11), (1, 1, 30, 34), (2, 2, 1, 2)],
        [(0, 0, 11, 12), (2, 2, 2, 5)],
        [(0, 0, 12, 30), (1, 3, 0, 21), (2, 2, 5, 6)],
        [(1, 3, 21, 22), (2, 2, 6, 60)],
    ]
    together = make_method().drafter(head, torch.device("cpu"))
    together.start(3, 80)
    alone = {text: make_method().drafter(head, torch.device("cpu")) for text in range(4)}
    for drafter in alone.values():
        drafter.start(1, 80)
    for call in calls:
        for slot, _, start, _ in call:
            if start == 0:
                together.restart(slot)
        news = [News(slot, tokens[text, a:b].tolist(), features[text, a:b]) for slot, text, a, b in call]
        trees = together.propose(news, policy, DraftContext(9))
        for one, tree, (_, text, _, _) in zip(news, trees, call, strict=True):
            (expected,) = alone[text].propose([News(0, one.tokens, one.features)], policy, DraftContext(9))
            assert tree.tokens.tolist() == expected.tokens.tolist()
            assert tree.parents.tolist() == expected.parents.tolist()
            torch.testing.assert_close(tree.confidence, expected.confidence, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_fills_its_cache_to_the_brim(head: Eagle3Head) -> None:
    """Padding of a short sequence beside a long one reaches beyond the capacity, and may not overwrite anything."""
    generator = torch.Generator().manual_seed(1)
    features, tokens = torch.randn(2, 48, 192, generator=generator), torch.randint(300, (2, 48), generator=generator)
    policy = Chain(depth=2)
    capacity = 48 + policy.drafted_tokens + 1
    drafter, alone = (make_method().drafter(head, torch.device("cpu")) for _ in range(2))
    drafter.start(2, capacity)
    alone.start(1, capacity)
    for (a, b), (c, d) in (((0, 40), (0, 10)), ((40, 46), (10, 40)), ((46, 48), (40, 41))):
        news = [News(0, tokens[0, a:b].tolist(), features[0, a:b]), News(1, tokens[1, c:d].tolist(), features[1, c:d])]
        found = drafter.propose(news, policy, DraftContext(2))[0]
        (expected,) = alone.propose(news[:1], policy, DraftContext(2))
        assert found.tokens.tolist() == expected.tokens.tolist()


# ---- loss ------------------------------------------------------------------------------------------------------------


def make_batch(frozen: FrozenHead, lengths: tuple[int, ...], trained: float = 0.7) -> FeatureBatch:
    generator = torch.Generator().manual_seed(4)
    batch, seq = len(lengths), max(lengths)
    there = torch.arange(seq) < torch.tensor(lengths)[:, None]
    hidden = torch.randn(batch, seq, 64, generator=generator)
    logits = frozen.logits(hidden)
    mask = there & (torch.rand(batch, seq, generator=generator) < trained)
    return FeatureBatch(
        features=torch.randn(batch, seq, 192, generator=generator) * there[..., None],
        input_ids=torch.randint(300, (batch, seq), generator=generator) * there,
        teacher_hidden=hidden * there[..., None],
        teacher_token=torch.where(mask, logits.argmax(-1), -1 if trained else 0),
        teacher_lse=torch.where(mask, logits.logsumexp(-1), 0.0),
        labels=torch.randint(300, (batch, seq), generator=generator),
        loss_mask=mask,
    )


def naive_loss(head: Eagle3Head, batch: FeatureBatch, frozen: FrozenHead, decay: float) -> StepOutput:
    """Position by position, in float64."""
    count, seq = batch.loss_mask.shape
    tokens = torch.cat([batch.input_ids, torch.zeros(count, STEPS, dtype=torch.int64)], 1)
    outs = head.unroll(head.fc(batch.features), [tokens[:, i : i + seq] for i in range(STEPS)])
    draft_ids = DRAFT_TOKENS.tolist()
    total = torch.zeros((), dtype=torch.float64)
    valid, losses, hits, overlap = ([0.0] * STEPS for _ in range(4))
    hit_at: dict[tuple[int, int, int], bool] = {}
    for step in range(STEPS):
        for b in range(count):
            for t in range(seq - step):
                s = t + step  # the row whose teacher this is
                if not batch.loss_mask[b, s] or int(batch.teacher_token[b, s]) not in draft_ids:
                    continue
                full = torch.softmax(frozen.logits(batch.teacher_hidden[b, s]).double(), -1)
                kept = full[DRAFT_TOKENS]
                target_probs = kept / kept.sum()
                draft_log = torch.log_softmax(head.logits(outs[step][b, t]).double(), -1)
                divergence = (target_probs * (target_probs.log() - draft_log)).sum()
                total = total + decay**step * divergence
                valid[step] += 1
                losses[step] += float(divergence.detach())
                overlap[step] += float(torch.minimum(kept, draft_log.exp()).sum().detach())
                hit = draft_ids[int(draft_log.argmax())] == int(batch.teacher_token[b, s])
                hits[step] += hit
                hit_at[step, b, t] = hit
    anchors = [
        (b, t)
        for b in range(count)
        for t in range(seq - STEPS + 1)
        if all(bool(batch.loss_mask[b, t + step]) for step in range(STEPS))
    ]
    chains = [[hit_at.get((step, b, t), False) for b, t in anchors] for step in range(STEPS)]
    numbers = [torch.tensor(row, dtype=torch.float32) for row in (valid, losses, hits, overlap)]
    return StepOutput(total, *numbers, torch.tensor(chains, dtype=torch.bool))


def test_loss_as_a_naive_loop(head: Eagle3Head, tiny_target: Target) -> None:
    method, frozen = make_method(ttt_decay=0.6), tiny_target.frozen_head
    batch = make_batch(frozen, (11, 4, 8), trained=0.9)
    # Some hits, so that their count is tested: the draft's own argmax becomes the teacher's.
    outs = head.unroll(
        head.fc(batch.features), [torch.nn.functional.pad(batch.input_ids, (0, i))[:, i:] for i in range(2)]
    )
    for step, b, t in ((0, 0, 0), (0, 0, 3), (1, 0, 4), (0, 2, 2)):
        if batch.loss_mask[b, t + step]:
            batch.teacher_token[b, t + step] = DRAFT_TOKENS[head.logits(outs[step][b, t]).argmax()]
    found, expected = method.loss(head, batch, frozen), naive_loss(head, batch, frozen, 0.6)
    assert found.valid.tolist() == expected.valid.tolist()
    assert found.hits.tolist() == expected.hits.tolist()
    assert float(found.hits[0]) >= 2
    assert found.chain_hits.tolist() == expected.chain_hits.tolist()
    assert found.chain_hits.shape[1] > 0 and bool(found.chain_hits.any())
    # A teacher outside the draft vocabulary was met, and is not valid.
    assert 0 < float(found.valid[0]) < float(batch.loss_mask.sum())
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.overlap, expected.overlap, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss.double(), expected.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        float(found.loss.detach()),
        sum(0.6**i * loss for i, loss in enumerate(found.losses.tolist())),
        rtol=1e-5,
        atol=0,
    )
    parameters = dict(head.named_parameters())
    grads = torch.autograd.grad(found.loss, list(parameters.values()))
    naive = torch.autograd.grad(expected.loss, list(parameters.values()))
    for name, one, other in zip(parameters, grads, naive, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0, msg=name)


def test_padding_changes_nothing(head: Eagle3Head, tiny_target: Target) -> None:
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, (6, 6))
    padded = FeatureBatch(
        **{name: torch.cat([rows, rows.new_zeros(2, 5, *rows.shape[2:])], 1) for name, rows in vars(batch).items()}
    )
    one, other = method.loss(head, batch, frozen), method.loss(head, padded, frozen)
    assert one.valid.tolist() == other.valid.tolist()
    assert one.chain_hits.tolist() == other.chain_hits.tolist()
    torch.testing.assert_close(one.losses, other.losses)


@pytest.mark.parametrize("seq", [1, 6])
def test_nothing_to_learn_from(head: Eagle3Head, tiny_target: Target, seq: int) -> None:
    batch = make_batch(tiny_target.frozen_head, (seq, seq), trained=0.0)
    found = make_method().loss(head, batch, tiny_target.frozen_head)
    assert found.loss.tolist() == 0
    for row in (found.valid, found.losses, found.hits, found.overlap):
        assert row.tolist() == [0.0] * STEPS
    assert found.chain_hits.shape == (STEPS, 0)
    for grad in torch.autograd.grad(found.loss, list(head.parameters())):
        assert not bool(grad.any()) and bool(grad.isfinite().all())


def test_a_perfect_draft_has_no_loss(head: Eagle3Head, tiny_target: Target) -> None:
    """Draft logits equal to the target's leave KL 0, overlap = coverage, and a hit at every position."""
    frozen = tiny_target.frozen_head
    method = make_method(ttt_steps=1)
    batch = make_batch(frozen, (5,), trained=1.0)
    with torch.no_grad():
        head.lm_head.weight.copy_(frozen.lm_head[DRAFT_TOKENS])
        out = head.norm(head.unroll(head.fc(batch.features), [batch.input_ids])[0])
    logits = frozen.logits(out)
    inside = DRAFT_TOKENS[logits[..., DRAFT_TOKENS].argmax(-1)]
    batch = replace(batch, teacher_hidden=out, teacher_token=inside, teacher_lse=logits.logsumexp(-1))
    found = method.loss(head, batch, frozen)
    coverage = torch.softmax(logits, -1)[..., DRAFT_TOKENS].sum()
    assert found.valid.tolist() == found.hits.tolist() == [5.0]
    assert found.loss.tolist() == pytest.approx(0, abs=1e-4)
    assert found.overlap.tolist() == pytest.approx([float(coverage)], abs=1e-4)
    assert not math.isnan(float(coverage))
