from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from sstf.decode import SpeculativeDecoder
from sstf.errors import ConfigError, TargetError
from sstf.features import FeatureSpec
from sstf.heads import MedusaHead
from sstf.methods import MedusaConfig, TrainableMethod, build_method
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits, News
from sstf.methods.checkpoint import DraftHead, load_head, save_head
from sstf.methods.medusa import MedusaMethod
from sstf.targets import FrozenHead, Target
from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, StaticTree
from sstf.types import FeatureBatch, HiddenTeacher, SamplingParams, StepOutput

HEADS = 3
DRAFT_TOKENS = torch.arange(0, 300, 2)  # the even half of the vocabulary
CPU = torch.device("cpu")


def make_method(**changes: object) -> MedusaMethod:
    return MedusaMethod(MedusaConfig.model_validate({"heads": HEADS, "draft_vocab_size": 150} | changes))


def random_head(target: Target, draft_tokens: Tensor = DRAFT_TOKENS, **changes: object) -> MedusaHead:
    """Blocks that are far from the identity, and from each other."""
    torch.manual_seed(1)
    head = make_method(**changes).build_head(target.spec, target.frozen_head, draft_tokens)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return head


# ---- configuration and start -----------------------------------------------------------------------------------------


def test_what_it_asks_for(tiny_target: Target) -> None:
    method = build_method(MedusaConfig(heads=4))
    assert isinstance(method, TrainableMethod)
    assert method.feature_spec(tiny_target.spec) == FeatureSpec((7,))
    assert method.limits == DraftLimits(depth=4)
    assert (method.positions, method.draft_vocab_size) == (4, WHOLE_VOCABULARY)
    assert make_method().draft_vocab_size == 150
    for wrong in ({"heads": 0}, {"heads": 17}, {"layers": 0}, {"lm_head": "none"}, {"draft_vocab_size": 4}):
        with pytest.raises(ValidationError):
            make_method(**wrong)


@pytest.mark.parametrize("lm_head", ["shared", "own"])
@torch.no_grad()
def test_a_new_head_says_what_the_target_says(lm_head: str, tiny_target: Target) -> None:
    """Read where it is fed in use: the last layer's output and the final norm give the target's own logits."""
    ids = torch.tensor([[4, 5, 250, 9]])
    head = make_method(lm_head=lm_head).build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS)
    kept: list[Tensor] = []
    with tiny_target.layers[7].register_forward_hook(lambda *seen: kept.append(seen[2])):
        expected = tiny_target.model(ids, use_cache=False).logits[..., ::2]
    (features,) = kept
    for i in range(HEADS):
        torch.testing.assert_close(head.logits(i, head.normed(features)), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in head.parameters()) == HEADS * (64 * 64 + 64 + (150 * 64 if lm_head == "own" else 0))


def test_what_is_shared_is_not_copied_and_not_trained(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    head = make_method().build_head(tiny_target.spec, frozen, torch.arange(300))
    assert head.lm_head.data_ptr() == frozen.lm_head.data_ptr()
    assert set(head.state_dict()) == {
        *(f"blocks.{i}.layers.0.{name}" for i in range(HEADS) for name in ("weight", "bias")), "d2t", "t2d",
    }  # fmt: skip
    own = make_method(lm_head="own", bias=False, layers=2).build_head(tiny_target.spec, frozen, DRAFT_TOKENS)
    assert {"lm_heads.2.weight", "blocks.0.layers.1.weight"} < set(own.state_dict())
    assert own.lm_heads[0].weight.data_ptr() != own.lm_heads[1].weight.data_ptr()


def test_a_final_norm_of_another_kind_is_refused(tiny_target: Target) -> None:
    gemma = replace(tiny_target.frozen_head, rms_norm=False)
    with pytest.raises(TargetError, match="target tiny: its final norm is no plain RMSNorm"):
        make_method().build_head(tiny_target.spec, gemma, DRAFT_TOKENS)


@pytest.mark.parametrize("lm_head", ["shared", "own"])
def test_on_disk_and_back(lm_head: str, tiny_target: Target, tmp_path: Path) -> None:
    head = random_head(tiny_target, lm_head=lm_head)
    save_head(tmp_path, make_method(lm_head=lm_head).config, head, tiny_target.spec, {})
    loaded = load_head(tmp_path, tiny_target)
    assert loaded.method.limits == DraftLimits(depth=HEADS)
    assert isinstance(loaded.module, MedusaHead)
    x = torch.randn(4, 64)
    for i in range(HEADS):
        torch.testing.assert_close(loaded.module.logits(i, x), head.logits(i, x))


# ---- loss ------------------------------------------------------------------------------------------------------------


def make_batch(frozen: FrozenHead, lengths: tuple[int, ...], trained: float = 0.7, seed: int = 4) -> FeatureBatch:
    generator = torch.Generator().manual_seed(seed)
    seq = sum(lengths)
    hidden = torch.randn(seq, 64, generator=generator)
    logits = frozen.logits(hidden)
    mask = torch.rand(seq, generator=generator) < trained
    return FeatureBatch(
        features=torch.randn(seq, 64, generator=generator),
        input_ids=torch.randint(300, (seq,), generator=generator),
        teacher=HiddenTeacher(hidden[mask], logits.logsumexp(-1)[mask]),
        teacher_token=torch.where(mask, logits.argmax(-1), -1),
        labels=torch.randint(300, (seq,), generator=generator),
        loss_mask=mask,
        lengths=lengths,
    )


def documents(batch: FeatureBatch) -> list[FeatureBatch]:
    """Each as a batch of its own."""
    assert isinstance(batch.teacher, HiddenTeacher)
    columns = {name: rows for name, rows in vars(batch).items() if isinstance(rows, Tensor)}
    trained = [int(part.sum()) for part in batch.loss_mask.split(batch.lengths)]
    found = []
    for i, length in enumerate(batch.lengths):
        own = {name: rows.split(batch.lengths)[i] for name, rows in columns.items()}
        teacher = HiddenTeacher(batch.teacher.hidden.split(trained)[i], batch.teacher.lse.split(trained)[i])
        found.append(FeatureBatch(**own, teacher=teacher, lengths=(length,)))
    return found


def naive_logits(head: MedusaHead, i: int, feature: Tensor, frozen: FrozenHead) -> Tensor:
    """Head i at one position, written out."""
    x = feature / (feature.square().mean() + 1e-6).sqrt() * frozen.final_norm
    for layer in head.blocks[i].layers:
        y = layer.weight @ x + (layer.bias if layer.bias is not None else 0)
        x = x + y / (1 + torch.exp(-y))
    weight = head.lm_heads[i].weight if head.shape.own_lm_heads else frozen.lm_head[DRAFT_TOKENS]
    return weight @ x


def naive_loss(head: MedusaHead, batch: FeatureBatch, frozen: FrozenHead, config: MedusaConfig) -> StepOutput:
    """Document by document, position by position."""
    draft_ids = DRAFT_TOKENS.tolist()
    total = torch.zeros(())
    valid, losses, hits, overlap = ([0.0] * HEADS for _ in range(4))
    chains: list[list[bool]] = []
    for document in documents(batch):
        (seq,) = document.lengths
        assert isinstance(document.teacher, HiddenTeacher)
        teacher_row = {int(t): i for i, (t,) in enumerate(document.loss_mask.nonzero())}
        hit_at: dict[tuple[int, int], bool] = {}
        for i in range(HEADS):
            for t in range(seq - i):
                s = t + i  # h_{s+1} predicts x_{s+2} = x_{t+2+i}
                if not document.loss_mask[s] or int(document.teacher_token[s]) not in draft_ids:
                    continue
                full = torch.softmax(frozen.logits(document.teacher.hidden[teacher_row[s]]), -1)
                kept = full[DRAFT_TOKENS]
                draft_log = torch.log_softmax(naive_logits(head, i, document.features[t], frozen), -1)
                alpha = torch.minimum(kept, draft_log.exp()).sum()
                divergence = -draft_log[kept.argmax()]
                if not config.objective.hard:
                    renormed = kept / kept.sum()
                    divergence = (renormed * (renormed.log() - draft_log)).sum()
                loss = config.objective.losses(divergence, alpha)
                total = total + config.decay**i * loss
                valid[i] += 1
                losses[i] += float(loss.detach())
                overlap[i] += float(alpha.detach())
                hit_at[i, t] = draft_ids[int(draft_log.argmax())] == int(document.teacher_token[s])
                hits[i] += hit_at[i, t]
        for t in range(seq - HEADS + 1):
            if bool(document.loss_mask[t : t + HEADS].all()):
                chains.append([hit_at.get((i, t), False) for i in range(HEADS)])
    numbers = [torch.tensor(row) for row in (valid, losses, hits, overlap)]
    return StepOutput(total, *numbers, torch.tensor(chains, dtype=torch.bool).reshape(-1, HEADS).T)


@pytest.mark.parametrize(
    "changes",
    [
        {"decay": 0.6},
        {"lm_head": "own"},
        {"objective": {"kind": "kl"}, "layers": 2, "bias": False},
        {"objective": {"kind": "tv"}},
        {"objective": {"kind": "lk_alpha"}, "lm_head": "own", "layers": 2},
        {"objective": {"kind": "lk_hybrid"}},
    ],
)
def test_loss_as_a_naive_loop(changes: dict[str, Any], tiny_target: Target) -> None:
    method, frozen = make_method(**changes), tiny_target.frozen_head
    head = random_head(tiny_target, **changes)
    batch = make_batch(frozen, (11, 2, 8, 1), trained=0.9)
    found, expected = method.loss(head, batch, frozen), naive_loss(head, batch, frozen, method.config)
    assert found.valid.tolist() == expected.valid.tolist()
    assert 0 < float(found.valid[0]) < float(batch.loss_mask.sum()), "a teacher outside the draft vocabulary was met"
    assert found.hits.tolist() == expected.hits.tolist()
    assert found.chain_hits.shape[1] > 0 and torch.equal(found.chain_hits, expected.chain_hits)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.overlap, expected.overlap, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    parameters = dict(head.named_parameters())
    ours = torch.autograd.grad(found.loss, list(parameters.values()))
    naive = torch.autograd.grad(expected.loss, list(parameters.values()))
    for name, one, other in zip(parameters, ours, naive, strict=True):
        assert bool(other.any()), name
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0, msg=name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
    trained=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    lm_head=st.sampled_from(["shared", "own"]),
)
def test_packed_is_the_sum_of_its_documents(
    tiny_target: Target, lengths: tuple[int, ...], trained: float, lm_head: str
) -> None:
    method, frozen = make_method(lm_head=lm_head), tiny_target.frozen_head
    head = random_head(tiny_target, lm_head=lm_head)
    batch = make_batch(frozen, lengths, trained)
    packed = method.loss(head, batch, frozen)
    alone = [method.loss(head, one, frozen) for one in documents(batch)]
    total = torch.stack([one.loss for one in alone]).sum()
    torch.testing.assert_close(packed.loss, total, rtol=1e-6, atol=1e-9)
    for name in ("valid", "hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in alone)), name
    assert torch.equal(packed.chain_hits, torch.cat([one.chain_hits for one in alone], 1))
    parameters = list(head.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (packed.loss, total)), strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-9
    if not trained:
        assert packed.loss.tolist() == 0 and packed.chain_hits.shape == (HEADS, 0)


def test_nothing_is_seen_before_its_time(tiny_target: Target) -> None:
    """Row t reads the state of position t alone: with what comes later changed, the earlier gradients stay."""
    method, frozen = make_method(), tiny_target.frozen_head
    head = random_head(tiny_target)
    batch = make_batch(frozen, (9,), trained=1.0)
    reads = batch.features.clone().requires_grad_()
    x = head.normed(reads)
    for t in range(9):
        (slope,) = torch.autograd.grad(head.logits(1, x)[t].sum(), reads, retain_graph=True)
        assert [bool(row.any()) for row in slope] == [i == t for i in range(9)]
    changed = replace(batch, input_ids=batch.input_ids.flip(0))  # it reads no tokens at all
    assert method.loss(head, changed, frozen).loss.tolist() == method.loss(head, batch, frozen).loss.tolist()


# ---- drafting --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_taught_is_what_is_drafted(tiny_target: Target) -> None:
    """Fed the same text, the drafter's chain at row t hits where the loss says that it does."""
    method, frozen = make_method(), tiny_target.frozen_head
    head = random_head(tiny_target)
    batch = make_batch(frozen, (24,), trained=1.0)
    drafter = method.drafter(head, CPU)
    drafter.start(1, 64)
    drafts = []
    for t in range(24):  # position by position: the drafter has no memory that could help or hinder it
        one = News(0, [int(batch.input_ids[t])], batch.features[t : t + 1])
        (tree,) = drafter.propose([one], Chain(depth=HEADS), DraftContext(9))
        drafts.append(tree.tokens.tolist())
    teacher_token = batch.teacher_token.clone()
    for t, i in ((0, 0), (1, 1), (2, 2), (9, 0), (9, 1), (9, 2), (20, 1)):
        teacher_token[t + i] = drafts[t][i]
    found = method.loss(head, replace(batch, teacher_token=teacher_token), frozen)
    expected = [[drafts[t][i] == int(teacher_token[t + i]) for t in range(24 - HEADS + 1)] for i in range(HEADS)]
    assert found.chain_hits.tolist() == expected
    assert all(any(row) and not all(row) for row in expected)


@torch.no_grad()
def test_a_level_is_a_head(tiny_target: Target) -> None:
    """Of the last state alone; confidences are the heads' probabilities; no head runs that the tree does not reach."""
    head = random_head(tiny_target)
    features = torch.randn(5, 64)
    probs = [torch.softmax(head.logits(i, head.normed(features[-1])), -1) for i in range(HEADS)]
    drafter = make_method().drafter(head, CPU)
    news = [News(0, [1, 2, 3, 4, 5], features)]
    (tree,) = drafter.propose(news, StaticTree.full(2, 2), DraftContext(9))
    best = [DRAFT_TOKENS[p.topk(2).indices].tolist() for p in probs]
    assert tree.tokens.tolist() == [*best[0], *best[1], *best[1]]
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1, 1]
    assert tree.confidence is not None
    torch.testing.assert_close(tree.confidence[2:4], probs[1].topk(2).values)
    assert drafter.levels == 2
    (deep,) = drafter.propose(news, Chain(depth=9), DraftContext(9))  # as a measurement may ask: what there is
    assert deep.tokens.tolist() == [row[0] for row in best] and drafter.levels == HEADS
    (short,) = drafter.propose(news, Chain(depth=3), DraftContext(1))
    assert len(short) == 1 and drafter.levels == 1


POLICIES: list[AnyTree] = [
    Chain(depth=3), StaticTree.full(3, 2, 1), DynamicTree(depth=3, top_k=4, total_tokens=9),
    DynamicTree(depth=2, top_k=12, total_tokens=40, lookup=True),
]  # fmt: skip


def decoder_of(target: Target, policy: AnyTree | None = None) -> SpeculativeDecoder:
    head: nn.Module = random_head(target, torch.arange(300), draft_vocab_size=None)
    return SpeculativeDecoder(target, DraftHead("medusa", make_method(), head.eval()), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_text_is_the_targets(policy: AnyTree, tiny_target: Target) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (1, 7, 30, 12)]
    params = SamplingParams(max_new_tokens=40)
    expected = [SpeculativeDecoder(tiny_target).generate(prompt, 40).token_ids for prompt in prompts]
    made = decoder_of(tiny_target, policy).generate_batch(prompts, params, slots=3)
    assert [one.token_ids for one in made] == expected
    alone = decoder_of(tiny_target, policy).generate(prompts[2], 40)
    assert (alone.token_ids, alone.accepted_lengths) == (expected[2], made[2].accepted_lengths)


def test_no_deeper_than_it_has_heads(tiny_target: Target) -> None:
    with pytest.raises(ConfigError, match="policy has depth 4, but head medusa drafts 3 tokens at once; expected a de"):
        decoder_of(tiny_target, Chain(depth=4))
    assert decoder_of(tiny_target).policy == Chain(depth=3)
