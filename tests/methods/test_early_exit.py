from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sstf.decode.layered import LayeredPasses
from sstf.errors import ConfigError, HeadError
from sstf.features import FeatureSpec
from sstf.heads import EarlyExitHead
from sstf.losses import Objective
from sstf.methods import EarlyExitConfig, TrainableMethod, build_method
from sstf.methods.base import WHOLE_VOCABULARY, News
from sstf.methods.checkpoint import load_head, save_head
from sstf.methods.early_exit import EarlyExitMethod
from sstf.targets import FrozenHead, SplitDecoder, Target
from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, StaticTree
from sstf.types import FeatureBatch, HiddenTeacher, StepOutput, TopKTeacher

EXIT, DEPTH = 3, 3
DRAFT_TOKENS = torch.arange(0, 300, 2)  # the even half of the vocabulary
CPU = torch.device("cpu")


def make_method(**changes: object) -> EarlyExitMethod:
    fields = {"exit_layer": EXIT, "depth": DEPTH, "threshold": 0.0, "draft_vocab_size": 150}
    return EarlyExitMethod(EarlyExitConfig.model_validate(fields | changes))


@pytest.fixture(params=[True, False], ids=["mlp", "attention-alone"])
def head(request: pytest.FixtureRequest, tiny_target: Target) -> EarlyExitHead:
    """Far from flat."""
    torch.manual_seed(1)
    found = make_method(mlp=request.param).build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return found


# ---- configuration and start -----------------------------------------------------------------------------------------


def test_the_exit_has_layers_on_both_sides(tiny_target: Target) -> None:
    assert make_method(exit_layer=1).feature_spec(tiny_target.spec) == FeatureSpec((0,))
    assert make_method(exit_layer=7).feature_spec(tiny_target.spec) == FeatureSpec((6,))
    for wrong in (0, 8, -2, 30):
        with pytest.raises(ConfigError, match=rf"method.exit_layer is {wrong}; expected 1 to 7, as target tiny has 8"):
            make_method(exit_layer=wrong).feature_spec(tiny_target.spec)


def test_is_a_trainable_method() -> None:
    method = build_method(EarlyExitConfig(exit_layer=5, depth=6, draft_vocab_size=77))
    assert isinstance(method, TrainableMethod)
    assert (method.shared_layers, method.positions, method.unrolls, method.draft_vocab_size) == (5, 6, 1, 77)
    assert make_method(draft_vocab_size=None).draft_vocab_size == WHOLE_VOCABULARY
    for wrong in ({"threshold": 1.5}, {"threshold": -0.1}, {"depth": 0}, {"draft_vocab_size": 3}):
        with pytest.raises(ValidationError):
            EarlyExitConfig.model_validate(wrong)


@torch.no_grad()
def test_a_new_adapter_reads_the_exit_layer_through_the_targets_end(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    head = make_method().build_head(tiny_target.spec, frozen, DRAFT_TOKENS)
    states = torch.randn(5, 64)
    expected = frozen.logits(tiny_target.final_norm(states))[:, ::2]
    torch.testing.assert_close(head.logits(head(states, (5,))), expected, atol=1e-5, rtol=1e-5)
    whole = make_method().build_head(tiny_target.spec, frozen, torch.arange(300))
    assert whole.lm_head.data_ptr() == frozen.lm_head.data_ptr()
    assert not any("lm_head" in name for name in (*dict(whole.named_parameters()), *whole.state_dict()))


def test_a_saved_head_loads_back(head: EarlyExitHead, tiny_target: Target, tmp_path: Path) -> None:
    config = make_method(threshold=0.25, mlp=head.shape.intermediate_size is not None).config
    save_head(tmp_path, config, head, tiny_target.spec, {"step": 7})
    loaded = load_head(tmp_path, tiny_target)
    assert loaded.method.config == config  # type: ignore[attr-defined]
    assert isinstance(loaded.module, EarlyExitHead)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name
    assert torch.equal(loaded.module.lm_head, tiny_target.frozen_head.lm_head[::2])
    save_head(tmp_path, config, torch.nn.Linear(2, 2), tiny_target.spec, {})
    with pytest.raises(HeadError, match="do not fit method early_exit"):
        load_head(tmp_path, tiny_target)


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


def naive_logits(head: EarlyExitHead, states: Tensor) -> Tensor:
    """[seq, draft_vocab] of one document, query by query and head by head."""
    shape, attention = head.shape, head.self_attn
    dim, groups = shape.head_dim, shape.num_heads // shape.num_kv_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + shape.rms_norm_eps).sqrt() * weight

    def turned(x: Tensor, position: int) -> Tensor:
        angles = position * shape.rope_theta ** -(torch.arange(0, dim, 2) / dim)
        low, high = x[: dim // 2], x[dim // 2 :]
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])

    normed = [norm(h, head.input_layernorm.weight) for h in states]  # type: ignore[arg-type]
    out = []
    for t, h in enumerate(states):
        parts = []
        for i in range(shape.num_heads):
            mine, theirs = slice(i * dim, (i + 1) * dim), slice(i // groups * dim, (i // groups + 1) * dim)
            query = turned(attention.q_proj.weight[mine] @ normed[t], t)
            keys = [turned(attention.k_proj.weight[theirs] @ normed[s], s) for s in range(t + 1)]
            weights = torch.softmax(torch.stack([query @ key for key in keys]) / dim**0.5, 0)
            values = [attention.v_proj.weight[theirs] @ normed[s] for s in range(t + 1)]
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        r = h + attention.o_proj.weight @ torch.cat(parts)  # type: ignore[arg-type]
        if shape.intermediate_size:
            x, mlp = norm(r, head.mlp.norm.weight), head.mlp  # type: ignore[arg-type]
            gate = mlp.gate_proj.weight @ x
            r = r + mlp.down_proj.weight @ (gate * torch.sigmoid(gate) * (mlp.up_proj.weight @ x))
        out.append(r)
    return torch.stack([head.lm_head @ norm(o, head.norm.weight) for o in out])  # type: ignore[arg-type]


def naive_loss(head: EarlyExitHead, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
    """Document by document, chain by chain: position i of the chain at row t stands on the state of row t + i + 1."""
    draft_ids = DRAFT_TOKENS.tolist()
    total = torch.zeros(())
    valid, losses, hits, overlap = ([0.0] * DEPTH for _ in range(4))
    chains: list[list[bool]] = []
    for document in documents(batch):
        logits = naive_logits(head, document.features)
        (seq,) = document.lengths
        assert isinstance(document.teacher, HiddenTeacher)
        teacher_row = {int(t): i for i, (t,) in enumerate(document.loss_mask.nonzero())}
        hit_at: dict[int, bool] = {}
        for t in range(seq):
            for i in range(DEPTH):
                s = t + i  # the row whose teacher this is
                if s + 1 >= seq or not document.loss_mask[s] or int(document.teacher_token[s]) not in draft_ids:
                    continue
                full = torch.softmax(frozen.logits(document.teacher.hidden[teacher_row[s]]), -1)
                kept = full[DRAFT_TOKENS]
                draft_log = torch.log_softmax(logits[s + 1], -1)
                divergence = (kept / kept.sum() * ((kept / kept.sum()).log() - draft_log)).sum()
                total = total + divergence * (i == 0)
                valid[i] += 1
                losses[i] += float(divergence.detach())
                overlap[i] += float(torch.minimum(kept, draft_log.exp()).sum().detach())
                hit_at[s] = draft_ids[int(draft_log.argmax())] == int(document.teacher_token[s])
                hits[i] += hit_at[s]
        for t in range(seq - DEPTH):
            if bool(document.loss_mask[t : t + DEPTH].all()):
                chains.append([hit_at.get(t + i, False) for i in range(DEPTH)])
    numbers = [torch.tensor(row, dtype=torch.float32) for row in (valid, losses, hits, overlap)]
    return StepOutput(total, *numbers, torch.tensor(chains, dtype=torch.bool).reshape(-1, DEPTH).T)


def test_loss_as_a_naive_loop(head: EarlyExitHead, tiny_target: Target) -> None:
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, (11, 1, 2, 7), trained=0.9)
    # Some hits, so that their count is tested: the adapter's own argmax becomes the teacher's.
    logits = torch.cat([naive_logits(head, one.features) for one in documents(batch)])
    for t in (0, 1, 3, 16):
        if batch.loss_mask[t]:
            batch.teacher_token[t] = DRAFT_TOKENS[logits[t + 1].argmax()]
    found, expected = method.loss(head, batch, frozen), naive_loss(head, batch, frozen)
    assert found.valid.tolist() == expected.valid.tolist()
    assert found.hits.tolist() == expected.hits.tolist() and float(found.hits[0]) >= 3
    assert found.chain_hits.tolist() == expected.chain_hits.tolist()
    assert found.chain_hits.shape[1] > 0 and bool(found.chain_hits.any())
    assert 0 < float(found.valid[0]) < float(batch.loss_mask.sum())
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.overlap, expected.overlap, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    parameters = dict(head.named_parameters())
    grads = torch.autograd.grad(found.loss, list(parameters.values()))
    naive = torch.autograd.grad(expected.loss, list(parameters.values()))
    for name, one, other in zip(parameters, grads, naive, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0, msg=name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
    trained=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_packed_is_the_sum_of_its_documents(
    head: EarlyExitHead, tiny_target: Target, lengths: tuple[int, ...], trained: float, seed: int
) -> None:
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, lengths, trained, seed)
    packed = method.loss(head, batch, frozen)
    alone = [method.loss(head, one, frozen) for one in documents(batch)]
    total = torch.stack([one.loss for one in alone]).sum()
    torch.testing.assert_close(packed.loss, total, rtol=1e-6, atol=1e-6)
    for name in ("valid", "hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in alone)), name
    assert torch.equal(packed.chain_hits, torch.cat([one.chain_hits for one in alone], 1))
    parameters = list(head.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (packed.loss, total)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)


@torch.no_grad()
def test_nothing_later_and_no_other_document_has_a_part(head: EarlyExitHead) -> None:
    states = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))
    before = head(states, (5, 7))
    for changed in (3, 4, 9):
        other = states.clone()
        other[changed] += 1.0
        end = 5 if changed < 5 else 12
        same = [t for t in range(12) if t < changed or t >= end]
        assert torch.equal(head(other, (5, 7))[same], before[same])
        assert not torch.allclose(head(other, (5, 7))[changed], before[changed])


@pytest.mark.parametrize("kind", ["kl", "ce", "tv", "lk_alpha", "lk_hybrid"])
def test_every_objective(kind: str, head: EarlyExitHead, tiny_target: Target) -> None:
    """A step against the gradient lowers it."""
    objective: Any = TypeAdapter(Objective).validate_python({"kind": kind})
    method, frozen = make_method(objective=objective), tiny_target.frozen_head
    batch = make_batch(frozen, (9, 12), trained=0.9)
    loss = method.loss(head, batch, frozen).loss
    parameters = list(head.parameters())
    grads = torch.autograd.grad(loss, parameters)
    size, before = sum(float(grad.square().sum()) for grad in grads), float(loss.detach())
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.sub_(grad, alpha=1e-3 * before / size)
    after = float(method.loss(head, batch, frozen).loss.detach())
    assert before - after == pytest.approx(1e-3 * before, rel=0.1)


def test_nothing_to_learn_from(head: EarlyExitHead, tiny_target: Target) -> None:
    """Also in documents of one row, whose supervised token stands behind a state that the batch lacks."""
    frozen = tiny_target.frozen_head
    for batch in (make_batch(frozen, (6, 6), trained=0.0), make_batch(frozen, (1, 1, 1), trained=1.0)):
        found = make_method().loss(head, batch, frozen)
        assert found.loss.tolist() == 0 and found.valid.tolist() == [0.0] * DEPTH
        assert found.chain_hits.shape == (DEPTH, 0)
        for grad in torch.autograd.grad(found.loss, list(head.parameters()), allow_unused=True):
            assert grad is None or not bool(grad.any())


# ---- what is trained is what is decoded ------------------------------------------------------------------------------


@torch.inference_mode()
def own_text(target: Target, prompt: Sequence[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(target.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@torch.inference_mode()
def exit_states(target: Target, ids: Sequence[int], exit_layer: int = EXIT) -> Tensor:
    with target.tap((exit_layer - 1,)) as taps:
        target.model(torch.tensor([list(ids)]), use_cache=False)
        return taps.features()[0]


@torch.inference_mode()
def batch_of(target: Target, ids: Sequence[int], exit_layer: int) -> FeatureBatch:
    """One document, of which every token was written by the target."""
    output = target.decoder(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
    logits = target.frozen_head.logits(output)
    rows = len(ids) - 2
    return FeatureBatch(
        features=exit_states(target, ids, exit_layer)[:rows].clone(),
        input_ids=torch.tensor(ids[1:-1]),
        teacher=HiddenTeacher(output[1:-1].clone(), logits.logsumexp(-1)[1:-1].clone()),
        teacher_token=logits.argmax(-1)[1:-1].clone(),
        labels=torch.tensor(ids[2:]),
        loss_mask=torch.ones(rows, dtype=torch.bool),
        lengths=(rows,),
    )


def passes_of(target: Target, slots: int, exit_layer: int = EXIT) -> LayeredPasses:
    return LayeredPasses(target, SplitDecoder(target, exit_layer), None, slots, 160)


def test_drafted_chains_are_those_of_the_loss(tiny_target: Target) -> None:
    """At every place of the target's own text the drafter's chain fits as far as the loss's hits say."""
    method = make_method(exit_layer=7)  # late enough for some hits
    head = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(3, 300))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    ids = own_text(tiny_target, [5, 6, 7, 8], 40)
    batch = batch_of(tiny_target, ids, 7)
    found = method.loss(head, batch, tiny_target.frozen_head)
    features = exit_states(tiny_target, ids, 7)
    passes, drafter = passes_of(tiny_target, 1, 7), method.drafter(head, CPU)
    expected, drafted = [], []
    for t in range(len(ids) - 2 - DEPTH):
        chain = found.chain_hits[:, t].long().cumprod(0)
        if ids[t + 2 : t + 2 + DEPTH] != batch.teacher_token[t : t + DEPTH].tolist():
            continue  # the prompt
        passes.prefill(0, ids[: t + 1])
        drafter.start(1, 150, passes)
        (tree,) = drafter.propose([News(0, ids[1 : t + 2], features[: t + 1])], Chain(depth=DEPTH), DraftContext(DEPTH))
        right = [a == b for a, b in zip(tree.tokens.tolist(), ids[t + 2 :], strict=False)]
        expected.append(int(chain.sum()))
        drafted.append(right.index(False) if False in right else DEPTH)
    assert drafted == expected and len(drafted) > 30
    assert len(set(drafted)) > 1


@torch.inference_mode()
def test_draft_probabilities_are_those_of_training(head: EarlyExitHead, tiny_target: Target) -> None:
    ids = own_text(tiny_target, [9, 4, 7], 12)
    features = exit_states(tiny_target, ids)
    expected = torch.softmax(head.logits(head(features, (len(ids),))), -1)
    passes, drafter = passes_of(tiny_target, 1), make_method().drafter(head, CPU)
    drafter.start(1, 64, passes)
    seen = 0
    for start, end in ((1, 6), (6, 7), (7, 12)):  # in several calls
        passes.prefill(0, ids[: end - 1])
        news = News(0, ids[start:end], features[start - 1 : end - 1])
        (tree,) = drafter.propose([news], StaticTree.full(5), DraftContext(1))
        assert tree.confidence is not None
        best = expected[end - 1].topk(5)
        assert tree.tokens.tolist() == DRAFT_TOKENS[best.indices].tolist()
        torch.testing.assert_close(tree.confidence, best.values, atol=1e-5, rtol=1e-4)
        seen += 1
    assert seen == 3


@torch.inference_mode()
@pytest.mark.parametrize(
    "policy", [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
)
def test_a_batch_drafts_what_each_sequence_drafts_alone(
    head: EarlyExitHead, policy: AnyTree, tiny_target: Target
) -> None:
    """Sequences of different lengths, in changing company; one ends and another takes its slot."""
    texts = torch.randint(300, (4, 40), generator=torch.Generator().manual_seed(1)).tolist()
    features = [exit_states(tiny_target, text) for text in texts]
    #           slot, text, tokens known before, tokens known now
    calls = [
        [(0, 0, 1, 9), (1, 1, 1, 20), (2, 2, 1, 2)],
        [(0, 0, 9, 11), (2, 2, 2, 3)],
        [(0, 0, 11, 30), (1, 3, 1, 12), (2, 2, 3, 8)],
    ]
    together, method = passes_of(tiny_target, 3), make_method(threshold=0.05)
    drafter = method.drafter(head, CPU)
    drafter.start(3, 100, together)
    for call in calls:
        news = []
        for slot, text, start, end in call:
            if start == 1:
                drafter.restart(slot)
            together.prefill(slot, texts[text][: end - 1])
            news.append(News(slot, texts[text][start:end], features[text][start - 1 : end - 1]))
        trees = drafter.propose(news, policy, DraftContext(9))
        for tree, (_, text, _, end) in zip(trees, call, strict=True):
            single, alone = passes_of(tiny_target, 1), method.drafter(head, CPU)
            alone.start(1, 100, single)
            single.prefill(0, texts[text][: end - 1])
            first = News(0, texts[text][1:end], features[text][: end - 1])
            (expected,) = alone.propose([first], policy, DraftContext(9))
            assert tree.tokens.tolist() == expected.tokens.tolist()
            assert tree.parents.tolist() == expected.parents.tolist()
            if len(tree):
                torch.testing.assert_close(tree.confidence, expected.confidence, atol=1e-5, rtol=1e-4)


def test_top_k_teaches_the_same_when_nothing_is_left_out(head: EarlyExitHead, tiny_target: Target) -> None:
    method, frozen = make_method(), tiny_target.frozen_head
    batch = make_batch(frozen, (11, 4), trained=0.9)
    assert isinstance(batch.teacher, HiddenTeacher)
    top = torch.log_softmax(frozen.logits(batch.teacher.hidden), -1).topk(300, -1)
    other = replace(batch, teacher=TopKTeacher(top.indices, top.values))
    one, two = method.loss(head, batch, frozen), method.loss(head, other, frozen)
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(two.overlap, one.overlap)
