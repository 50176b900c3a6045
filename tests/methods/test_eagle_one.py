"""EAGLE-1 and HASS; with the dynamic tree EAGLE-2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafted_rows import (
    DRAFT_TOKENS,
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
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sstf.errors import ConfigError
from sstf.features import FeatureSpec
from sstf.heads import Eagle1Head
from sstf.losses import CrossEntropy, Kl, LkHybrid, Objective
from sstf.methods import EagleConfig, TrainableMethod, build_method
from sstf.methods.base import WHOLE_VOCABULARY
from sstf.methods.eagle import EagleMethod
from sstf.targets import FrozenHead, Target
from sstf.trees import AnyTree, Chain, DynamicTree, StaticTree
from sstf.types import FeatureBatch, HiddenTeacher

STEPS = 3
TAPS = 64


def make_method(**changes: object) -> EagleMethod:
    return EagleMethod(EagleConfig.model_validate({"ttt_steps": STEPS, "draft_vocab_size": 150} | changes))


def random_head(target: Target, draft_tokens: Tensor = DRAFT_TOKENS, **changes: object) -> Eagle1Head:
    """Far from flat."""
    torch.manual_seed(1)
    found = make_method(**changes).build_head(target.spec, target.frozen_head, draft_tokens)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return found


def batch_of(frozen: FrozenHead, lengths: tuple[int, ...], trained: float = 0.9, seed: int = 4) -> FeatureBatch:
    return make_batch(frozen, lengths, TAPS, trained, seed)


# ---- configuration and head ------------------------------------------------------------------------------------------


def test_reads_the_last_layer_and_proposes_any_token(tiny_target: Target) -> None:
    method = build_method(EagleConfig())
    assert isinstance(method, TrainableMethod)
    assert method.feature_spec(tiny_target.spec) == FeatureSpec((7,))
    assert (method.draft_vocab_size, method.positions, method.unrolls) == (WHOLE_VOCABULARY, 1, 1)
    assert method.limits.trees and method.limits.depth is None
    for wrong in ({"ttt_steps": 0}, {"num_layers": 0}, {"token_weight": 0}, {"draft_vocab_size": 1}):
        with pytest.raises(ValidationError, match="greater than"):
            EagleConfig.model_validate(wrong)


def test_state_dict_has_the_names_that_vllm_reads(tiny_target: Target) -> None:
    """`llama_eagle.py` has no norm in front of the first layer, and none behind the last."""

    def layer(i: int) -> set[str]:
        parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        norms = ["post_attention_layernorm"] + ["input_layernorm"] * (i > 0)
        return {f"layers.{i}.{part}.weight" for part in [*parts, *norms]}

    assert set(random_head(tiny_target).state_dict()) == {"d2t", "t2d", "fc.weight"} | layer(0)
    assert set(random_head(tiny_target, num_layers=2).state_dict()) >= layer(0) | layer(1)


@torch.no_grad()
def test_layers_are_llamas(tiny_target: Target) -> None:
    """`fc`, then transformers' own decoder layers, the first without its input norm."""
    head = random_head(tiny_target, num_layers=2)
    spec = tiny_target.spec
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=spec.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        attn_implementation="eager",
    )  # fmt: skip
    batch = batch_of(tiny_target.frozen_head, (9,))
    f = F.rms_norm(batch.features, (64,), tiny_target.frozen_head.final_norm, spec.rms_norm_eps)
    x = head.fc(torch.cat([tiny_target.frozen_head.embeddings[batch.input_ids], f], -1))[None]
    turn = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    for i, own in enumerate(head.plain_layers):
        layer = LlamaDecoderLayer(config, 0)
        missing = layer.load_state_dict(own.state_dict(), strict=False)
        assert missing.missing_keys == (["input_layernorm.weight"] if i == 0 else []) and not missing.unexpected_keys
        if i == 0:
            layer.input_layernorm = torch.nn.Identity()
        x = layer(x, attention_mask=mask, position_embeddings=turn)
    found = head.unroll(head.fuse(batch.features), batch.input_ids, (9,), torch.arange(9)[None])
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_reads_what_the_targets_lm_head_reads(tiny_target: Target) -> None:
    """The head's f of the last layer's output is transformers' last hidden state."""
    ids = torch.tensor([[4, 5, 250, 17]])
    head = random_head(tiny_target)
    with tiny_target.tap((7,)) as taps:
        expected = tiny_target.decoder(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head.fuse(taps.features()), expected, atol=1e-5, rtol=1e-5)


def test_target_with_another_final_norm_is_refused(tiny_target: Target) -> None:
    with pytest.raises(ConfigError, match=r"final norm of target tiny .* is no RMSNorm by its weight alone.*eagle3"):
        make_method().build_head(tiny_target.spec, replace(tiny_target.frozen_head, rms_norm=False), DRAFT_TOKENS)


@torch.no_grad()
def test_draft_logits_are_the_frozen_ones(tiny_target: Target) -> None:
    states = torch.randn(3, 64)
    for frozen in (tiny_target.frozen_head, replace(tiny_target.frozen_head, scale=0.25)):
        for draft_tokens in (DRAFT_TOKENS, torch.arange(300)):
            head = make_method().build_head(tiny_target.spec, frozen, draft_tokens)
            torch.testing.assert_close(head.logits(states), frozen.logits(states, draft_tokens))
    assert head.target_head.data_ptr() == frozen.lm_head.data_ptr()  # of the whole vocabulary: no copy


# ---- loss ------------------------------------------------------------------------------------------------------------


def drafts_of(head: Eagle1Head, steps: int) -> object:
    def drafts(document: FeatureBatch, t: int) -> Tensor:
        (seq,) = document.lengths
        f = list(head.fuse(document.features[: t + 1]))
        found = []
        for step in range(min(steps, seq - t)):
            tokens, positions = document.input_ids[: t + 1 + step], torch.arange(t + 1 + step)
            x = head.fc(torch.cat([head.embeddings[tokens], torch.stack(f)], -1))
            f.append(causal(head.plain_layers, x, x, head.rope(positions))[-1])
            found.append(f[-1])
        return torch.stack(found)

    return drafts


@pytest.mark.parametrize(
    ("steps", "layers", "objective"),
    [(1, 1, Kl()), (3, 1, LkHybrid()), (3, 2, Kl()), (2, 3, CrossEntropy())],
)
def test_loss_as_a_naive_loop(steps: int, layers: int, objective: Objective, tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    method = make_method(ttt_steps=steps, num_layers=layers, ttt_decay=0.6, token_weight=0.3, feature_weight=0.7)
    method.config = method.config.model_copy(update={"objective": objective})
    head, batch = random_head(tiny_target, num_layers=layers), batch_of(frozen, (11, 1, 4, 8))
    found = method.loss(head, batch, frozen)
    expected = naive_loss(
        batch, frozen, DRAFT_TOKENS, frozen.lm_head[DRAFT_TOKENS], drafts_of(head, steps), objective,
        [0.6**i for i in range(steps)], token_weight=0.3, feature_weight=0.7,
    )  # fmt: skip
    check_loss(found, expected, head)
    assert found.valid[0] < batch.loss_mask.sum()  # a teacher outside the draft vocabulary was met


def test_a_perfect_head_has_no_loss(tiny_target: Target) -> None:
    """With f_hat = f: no distance, KL 0 over the whole vocabulary, hits everywhere."""
    frozen, method = tiny_target.frozen_head, make_method(ttt_steps=1, draft_vocab_size=None)
    head, batch = random_head(tiny_target, torch.arange(300)), batch_of(frozen, (5,), trained=1.0)
    with torch.no_grad():
        f = head.unroll(head.fuse(batch.features), batch.input_ids, (5,), torch.arange(5)[None])[0]
    logits = frozen.logits(f)
    batch = replace(batch, teacher=HiddenTeacher(f, logits.logsumexp(-1)), teacher_token=logits.argmax(-1))
    found = method.loss(head, batch, frozen)
    assert found.valid.tolist() == found.hits.tolist() == [5.0]
    assert found.loss.tolist() == pytest.approx(0, abs=1e-5)


def test_without_the_hidden_state_the_next_rows_feature_is_the_goal(tiny_target: Target) -> None:
    """A top-k teacher that leaves nothing out teaches the same, but for each document's last row, which has no next."""
    frozen, method = tiny_target.frozen_head, make_method(token_weight=0.3)
    head, batch = random_head(tiny_target), batch_of(frozen, (11, 1, 4), trained=1.0)
    exact, top = method.loss(head, batch, frozen), method.loss(head, top_k_of(batch, frozen, 300), frozen)
    tokens_only = make_method(token_weight=0.3, feature_weight=0).loss(head, batch, frozen)
    without = batch.loss_mask.clone()
    without[torch.tensor(batch.lengths).cumsum(0) - 1] = False
    assert isinstance(batch.teacher, HiddenTeacher)
    inner = replace(
        batch, loss_mask=without, teacher=HiddenTeacher(batch.teacher.hidden[without], batch.teacher.lse[without])
    )
    distance = (
        method.loss(head, inner, frozen).loss
        - make_method(token_weight=0.3, feature_weight=0).loss(head, inner, frozen).loss
    )
    torch.testing.assert_close(top.loss, tokens_only.loss + distance, atol=1e-4, rtol=1e-4)
    assert float(top.loss.detach()) < float(exact.loss.detach())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", [(11, 4, 8), (1, 1, 13), (2, 9)])
def test_packed_is_the_sum_of_its_documents(lengths: tuple[int, ...], layers: int, tiny_target: Target) -> None:
    frozen, head = tiny_target.frozen_head, random_head(tiny_target, num_layers=layers)
    check_packing(make_method(), head, batch_of(frozen, lengths), frozen)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_future_is_not_seen(layers: int, tiny_target: Target) -> None:
    head = random_head(tiny_target, num_layers=layers)
    check_no_leak(make_method(), head, batch_of(tiny_target.frozen_head, (13,)), tiny_target.frozen_head)


def test_nothing_to_learn_from(tiny_target: Target) -> None:
    head = random_head(tiny_target)
    found = make_method().loss(head, batch_of(tiny_target.frozen_head, (4, 2), trained=0.0), tiny_target.frozen_head)
    assert found.loss.tolist() == 0 and found.valid.tolist() == [0.0] * STEPS
    for grad in torch.autograd.grad(found.loss, list(head.parameters())):
        assert not bool(grad.any()) and bool(grad.isfinite().all())


# ---- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_trained_is_what_is_drafted(layers: int, tiny_target: Target) -> None:
    method = make_method(ttt_steps=4, num_layers=layers)
    check_drafts_as_trained(method, random_head(tiny_target, num_layers=layers), tiny_target.frozen_head, TAPS)


@pytest.mark.parametrize(
    "policy", [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
)
def test_a_batch_drafts_what_each_sequence_drafts_alone(policy: AnyTree, tiny_target: Target) -> None:
    check_batch_drafts_as_alone(make_method(), random_head(tiny_target, num_layers=2), policy, TAPS)


@pytest.mark.parametrize(("steps", "rate"), [(1, 3e-3), (3, 1e-2)])
def test_texts_learned_by_heart_are_drafted(steps: int, rate: float, tiny_target: Target, tmp_path: Path) -> None:
    config = EagleConfig(ttt_steps=steps)
    head, samples = learn_by_heart(EagleMethod(config), config, tiny_target, tmp_path, steps=150, learning_rate=rate)
    for policy, least in ((Chain(depth=2), 2.6), (DynamicTree(depth=2, top_k=2, total_tokens=5), 2.6)):
        check_by_heart(head, samples, tiny_target, policy, least)
