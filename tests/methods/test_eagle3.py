from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import ConfigError
from sstf.features import FeatureSpec, rows_ahead
from sstf.heads import Eagle3Head, FusedEagle
from sstf.methods import Eagle3Config, TrainableMethod, build_method, cached_drafter, eagle3
from sstf.methods.base import News
from sstf.targets import FrozenHead, PreallocatedCache, Target
from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, StaticTree
from sstf.types import DraftTree, FeatureBatch, HiddenTeacher, StepOutput, TopKTeacher

DRAFT_TOKENS = torch.arange(0, 300, 2)  # the even half of the vocabulary
STEPS = 4


def make_method(**changes: object) -> eagle3.Eagle3Method:
    return eagle3.Eagle3Method(Eagle3Config.model_validate({"ttt_steps": STEPS, "draft_vocab_size": 150} | changes))


@pytest.fixture
def head(tiny_target: Target) -> Eagle3Head:
    return random_head(tiny_target)


def random_head(target: Target, **changes: object) -> Eagle3Head:
    """Far from flat."""
    torch.manual_seed(1)
    found = make_method(**changes).build_head(target.spec, target.frozen_head, DRAFT_TOKENS)
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


def test_a_shape_that_is_the_targets_is_not_written() -> None:
    """Keys of stages, checkpoints and heads are made of what is written: those of earlier versions stay valid."""
    fields = ["kind", "layers", "draft_vocab_size", "ttt_steps", "ttt_decay", "init", "objective"]
    assert list(Eagle3Config().model_dump(mode="json")) == fields
    other = Eagle3Config(intermediate_size=96, rope_scaling={"rope_type": "default"}, norm_output=True)
    dumped = other.model_dump(mode="json")
    assert list(dumped) == [*fields, "intermediate_size", "rope_scaling", "norm_output"]
    assert Eagle3Config.model_validate_json(other.model_dump_json()) == other


def test_shapes_that_contradict_themselves() -> None:
    with pytest.raises(ValidationError, match=r"norm_before_fc and method\.fc_norm norm the same values"):
        Eagle3Config(norm_before_fc=True, fc_norm=True)
    with pytest.raises(ValidationError, match="rope_type 'longrope'; expected default, linear"):
        Eagle3Config(rope_scaling={"rope_type": "longrope"})


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
        patched.setattr(cached_drafter, "grow", forced)
        for features, tokens in calls:
            drafter.propose([News(0, tokens.tolist(), features)], Chain(), DraftContext(8))
    return levels


def unrolled(head: Eagle3Head, features: Tensor, tokens: Tensor) -> list[Tensor]:
    """Log draft_probs [seq, draft_vocab] of every training step of one document; `tokens` may go beyond `features`."""
    rows = len(tokens) - STEPS + 1
    missing = torch.zeros(len(tokens) - len(features), features.shape[1])  # behind all that is looked at
    ahead, _ = rows_ahead((len(tokens),), STEPS, torch.device("cpu"))
    g = head.fc(torch.cat([features, missing]))
    outs = head.unroll(g, tokens, (len(tokens),), ahead[:, :rows])
    return [torch.log_softmax(head.logits(out), -1) for out in outs]


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


def make_batch(frozen: FrozenHead, lengths: tuple[int, ...], trained: float = 0.7, seed: int = 4) -> FeatureBatch:
    generator = torch.Generator().manual_seed(seed)
    seq = sum(lengths)
    hidden = torch.randn(seq, 64, generator=generator)
    logits = frozen.logits(hidden)
    mask = torch.rand(seq, generator=generator) < trained
    return FeatureBatch(
        features=torch.randn(seq, 192, generator=generator),
        input_ids=torch.randint(300, (seq,), generator=generator),
        teacher=HiddenTeacher(hidden[mask], logits.logsumexp(-1)[mask]),
        teacher_token=torch.where(mask, logits.argmax(-1), -1 if trained else 0),
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


def unroll_whole(head: Eagle3Head, document: FeatureBatch, steps: int = STEPS) -> Tensor:
    """[steps, seq, hidden], at all rows of one document."""
    ahead, _ = rows_ahead(document.lengths, steps, torch.device("cpu"))
    return head.unroll(head.fc(document.features), document.input_ids, document.lengths, ahead)


def naive_loss(head: Eagle3Head, batch: FeatureBatch, frozen: FrozenHead, decay: float) -> StepOutput:
    """Document by document, position by position, in float64."""
    draft_ids = DRAFT_TOKENS.tolist()
    total = torch.zeros((), dtype=torch.float64)
    valid, losses, hits, overlap = ([0.0] * STEPS for _ in range(4))
    chains: list[list[bool]] = []  # of each anchor
    for document in documents(batch):
        outs = unroll_whole(head, document)
        (seq,) = document.lengths
        assert isinstance(document.teacher, HiddenTeacher)
        teacher_row = {int(t): i for i, (t,) in enumerate(document.loss_mask.nonzero())}
        hit_at: dict[tuple[int, int], bool] = {}
        for step in range(STEPS):
            for t in range(seq - step):
                s = t + step  # the row whose teacher this is
                if not document.loss_mask[s] or int(document.teacher_token[s]) not in draft_ids:
                    continue
                full = torch.softmax(frozen.logits(document.teacher.hidden[teacher_row[s]]).double(), -1)
                kept = full[DRAFT_TOKENS]
                target_probs = kept / kept.sum()
                draft_log = torch.log_softmax(head.logits(outs[step][t]).double(), -1)
                divergence = (target_probs * (target_probs.log() - draft_log)).sum()
                total = total + decay**step * divergence
                valid[step] += 1
                losses[step] += float(divergence.detach())
                overlap[step] += float(torch.minimum(kept, draft_log.exp()).sum().detach())
                hit_at[step, t] = draft_ids[int(draft_log.argmax())] == int(document.teacher_token[s])
                hits[step] += hit_at[step, t]
        for t in range(seq - STEPS + 1):
            if bool(document.loss_mask[t : t + STEPS].all()):
                chains.append([hit_at.get((step, t), False) for step in range(STEPS)])
    numbers = [torch.tensor(row, dtype=torch.float32) for row in (valid, losses, hits, overlap)]
    return StepOutput(total, *numbers, torch.tensor(chains, dtype=torch.bool).reshape(-1, STEPS).T)


def test_loss_as_a_naive_loop(head: Eagle3Head, tiny_target: Target) -> None:
    method, frozen = make_method(ttt_decay=0.6), tiny_target.frozen_head
    batch = make_batch(frozen, (11, 4, 8), trained=0.9)
    # Some hits, so that their count is tested: the draft's own argmax becomes the teacher's.
    outs = [torch.cat(parts) for parts in zip(*(unroll_whole(head, one) for one in documents(batch)), strict=True)]
    for step, t in ((0, 0), (0, 3), (1, 4), (0, 17)):
        if batch.loss_mask[t + step]:
            batch.teacher_token[t + step] = DRAFT_TOKENS[head.logits(outs[step][t]).argmax()]
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


def top_k_of(batch: FeatureBatch, frozen: FrozenHead, k: int) -> FeatureBatch:
    """The same batch, taught by the target's `k` most likely tokens."""
    assert isinstance(batch.teacher, HiddenTeacher)
    top = torch.log_softmax(frozen.logits(batch.teacher.hidden), -1).topk(k, -1)
    return replace(batch, teacher=TopKTeacher(top.indices, top.values))


def test_top_k_teaches_the_same_when_nothing_is_left_out(head: Eagle3Head, tiny_target: Target) -> None:
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, (11, 4, 8), trained=0.9)
    one, other = method.loss(head, batch, frozen), method.loss(head, top_k_of(batch, frozen, 300), frozen)
    for name in ("loss", "losses", "overlap", "valid", "hits"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), msg=name)
    assert torch.equal(other.chain_hits, one.chain_hits)
    grads = [torch.autograd.grad(found.loss, list(head.parameters())) for found in (one, other)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5 * max(1.0, float(a.abs().max())), rtol=0)


def test_top_k_teaches_a_truncated_distribution(head: Eagle3Head, tiny_target: Target) -> None:
    """With k = 1 all the mass is on the argmax: the loss is the plain cross-entropy of the teacher's token."""
    method, frozen = make_method(ttt_steps=1), tiny_target.frozen_head
    batch = make_batch(frozen, (9, 5), trained=0.8)
    found = method.loss(head, top_k_of(batch, frozen, 1), frozen)
    out = torch.cat([unroll_whole(head, one, 1)[0] for one in documents(batch)])
    log_probs = torch.log_softmax(head.logits(out), -1)
    valid = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
    expected = -log_probs[valid][torch.arange(int(valid.sum())), batch.teacher_token[valid] // 2].sum()
    assert found.valid.tolist() == [float(valid.sum())]
    torch.testing.assert_close(found.loss, expected)
    assert float(found.overlap) < float(method.loss(head, batch, frozen).overlap)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
    trained=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_packed_is_the_sum_of_its_documents(
    head: Eagle3Head, tiny_target: Target, lengths: tuple[int, ...], trained: float, seed: int
) -> None:
    """Loss to 1e-6, gradients to 3e-6 (more roundings); nothing passes from document to document."""
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, lengths, trained, seed)
    packed = method.loss(head, batch, frozen)
    alone = [method.loss(head, one, frozen) for one in documents(batch)]
    parameters = list(head.parameters())
    total = torch.stack([one.loss for one in alone]).sum()
    torch.testing.assert_close(packed.loss, total, rtol=1e-6, atol=1e-9)
    for name in ("valid", "hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in alone)), name
    assert torch.equal(packed.chain_hits, torch.cat([one.chain_hits for one in alone], 1))
    grads = (torch.autograd.grad(loss, parameters) for loss in (packed.loss, total))
    found, expected = (list(some) for some in grads)
    whole, difference = (
        torch.cat([grad.flatten() for grad in some])
        for some in (expected, [a - b for a, b in zip(found, expected, strict=True)])
    )
    assert float(difference.norm()) <= 3e-6 * float(whole.norm())
    for one, other in zip(found, expected, strict=True):
        # Some are sums of terms that cancel: where one key alone is seen, the query's is 0, and rounding is found.
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 0.1 * float(whole.norm()))


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
        {"fc_norm": True, "num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "intermediate_size": 96},
        {"rms_norm_eps": 0.1, "rope_theta": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ],
)
@torch.no_grad()
def test_each_step_is_what_the_decoder_computes(variant: dict[str, object], tiny_target: Target) -> None:
    """Training's logits of step i at position t are those of the fused decode head that has read positions 0..t of
    that document with the target's features, and then drafted i tokens, fed the same tokens through its cache."""
    head = random_head(tiny_target, **variant)
    batch = make_batch(tiny_target.frozen_head, (7, 1, 12, 3))
    ahead, there = rows_ahead(batch.lengths, STEPS, torch.device("cpu"))
    found = head.logits(head.unroll(head.fuse(batch.features), batch.input_ids, batch.lengths, ahead))
    decoder = FusedEagle(head)
    cache = PreallocatedCache(("attention",), 1, 32)
    decoder.make_rope(32)
    seen = 0
    start = 0
    for length in batch.lengths:
        tokens, features = (rows[None, start : start + length] for rows in (batch.input_ids, batch.features))
        for t in range(length):
            cache.write_behind(0)
            places = torch.arange(t + 1)
            causal = (places <= places[:, None])[None]
            out = decoder(decoder.fuse(features[:, : t + 1]), tokens[:, : t + 1], places[None], causal, cache)[:, -1:]
            for step in range(min(STEPS, length - t)):
                at = t + step
                if step > 0:
                    cache.write_behind(at)
                    everything = torch.ones(1, 1, at + 1, dtype=torch.bool)
                    out = decoder(
                        decoder.fed_back(out), tokens[:, at : at + 1], torch.tensor([[at]]), everything, cache
                    )
                torch.testing.assert_close(found[step, start + t], decoder.logits(out)[0, 0], atol=1e-5, rtol=1e-5)
                seen += 1
        start += length
    assert seen == int(there.sum())


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
        out = head.norm(unroll_whole(head, batch, 1)[0])
    logits = frozen.logits(out)
    inside = DRAFT_TOKENS[logits[..., DRAFT_TOKENS].argmax(-1)]
    assert bool(batch.loss_mask.all())
    batch = replace(batch, teacher=HiddenTeacher(out, logits.logsumexp(-1)), teacher_token=inside)
    found = method.loss(head, batch, frozen)
    coverage = torch.softmax(logits, -1)[..., DRAFT_TOKENS].sum()
    assert found.valid.tolist() == found.hits.tolist() == [5.0]
    assert found.loss.tolist() == pytest.approx(0, abs=1e-4)
    assert found.overlap.tolist() == pytest.approx([float(coverage)], abs=1e-4)
    assert not math.isnan(float(coverage))
