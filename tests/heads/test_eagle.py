from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sstf.features import rows_ahead
from sstf.heads import Eagle3Head, EagleShape
from sstf.heads.eagle import rotate
from sstf.targets.spec import spec_of

SHAPE = EagleShape(
    hidden_size=12,
    taps=36,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,  # not hidden_size / num_heads
    intermediate_size=20,
    draft_vocab_size=7,
    vocab_size=15,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    max_position_embeddings=128,
)
DRAFT_TOKENS = torch.tensor([0, 2, 3, 5, 8, 13, 14])


def make_head(seed: int = 0, **changes: object) -> Eagle3Head:
    torch.manual_seed(seed)
    head = Eagle3Head(replace(SHAPE, **changes), torch.randn(SHAPE.vocab_size, SHAPE.hidden_size), DRAFT_TOKENS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.4)
    return head


def test_vocabulary_maps() -> None:
    head = make_head()
    assert head.d2t.tolist() == [0, 1, 1, 2, 4, 8, 8]  # target id less draft id
    assert head.draft_tokens.tolist() == DRAFT_TOKENS.tolist()
    assert head.t2d.nonzero()[:, 0].tolist() == DRAFT_TOKENS.tolist()


def test_state_dict_has_the_names_of_published_checkpoints() -> None:
    attention = [f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    norms = [f"midlayer.{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")]
    expected = {"d2t", "t2d", "fc.weight", "lm_head.weight", "norm.weight", *attention, *mlp, *norms}
    assert set(make_head().state_dict()) == expected


def test_rope_is_llamas() -> None:
    config = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        head_dim=SHAPE.head_dim,
        num_attention_heads=SHAPE.num_heads,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )
    positions = torch.tensor([[0, 1, 5, 99], [3, 2, 1, 0]])
    x = torch.randn(2, SHAPE.num_heads, 4, SHAPE.head_dim, generator=torch.Generator().manual_seed(0))
    expected, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))
    found = rotate(x.transpose(1, 2), *make_head().rope(positions))  # [batch, seq, heads, head_dim]
    torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5, beta_fast=16.0),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ],
)
def test_scaled_rope_is_that_of_a_target_that_scales_alike(scaling: dict[str, object]) -> None:
    """Cosine and sine at near and far positions, the attention factor included, to the end of the context."""
    target = tiny_llama(
        max_position_embeddings=128,
        rope_parameters=scaling | {"rope_theta": 500.0},
        hidden_size=64,
        num_attention_heads=2,
    )
    spec = spec_of("target", target.config, "LlamaForCausalLM", torch.float32, "")
    assert (spec.rope_theta, spec.rope_scaling) == (500.0, scaling)
    positions = torch.tensor([[0, 1, 31, 33, 64, 127]])
    expected = target.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    head = make_head(head_dim=32, rope_scaling=spec.rope_scaling)
    for found, right in zip(head.rope(positions), expected, strict=True):
        torch.testing.assert_close(found[:, :, 0], right[..., :16], atol=2e-5, rtol=0)
    plain = make_head(head_dim=32).rope(positions)[0]
    assert torch.allclose(plain, head.rope(positions)[0], atol=1e-4) == (scaling["rope_type"] == "dynamic")


def test_rope_does_not_follow_the_head_into_low_precision() -> None:
    """Training keeps float32 positions under autocast; a decoder in bf16 must turn by the same angles."""
    positions = torch.tensor([0, 100, 5000])
    head = make_head()
    expected = head.rope(positions)
    for found, angles in zip(head.to(torch.bfloat16).rope(positions), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, angles)
    # The slowest of the three frequencies, by hand.
    slowest = SHAPE.rope_theta ** (-4 / 6)
    assert float(expected[0][1, 0, 2]) == pytest.approx(math.cos(100 * slowest), abs=1e-5)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + SHAPE.rms_norm_eps).sqrt()


@torch.no_grad()
def test_norms_before_fc() -> None:
    """`norm_before_fc` norms all that fc reads as one vector, `fc_norm` each layer's part with weights of its own."""
    features = torch.randn(5, SHAPE.taps) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(SHAPE.hidden_size)
    plain, whole, each = make_head(), make_head(norm_before_fc=True), make_head(fc_norm=True)
    torch.testing.assert_close(plain.fuse(features), features @ plain.fc.weight.T)
    torch.testing.assert_close(whole.fuse(features), (unit(features) * whole.input_norm.weight) @ whole.fc.weight.T)
    parts = [unit(part) * norm.weight for part, norm in zip(features.split(12, -1), each.fc_norm, strict=True)]
    torch.testing.assert_close(each.fuse(features), torch.cat(parts, -1) @ each.fc.weight.T)
    assert {"input_norm.weight"} == set(whole.state_dict()) - set(plain.state_dict())
    assert {f"fc_norm.{i}.weight" for i in range(3)} == set(each.state_dict()) - set(plain.state_dict())


@torch.no_grad()
def test_the_residual_and_what_is_fed_back_can_be_normed() -> None:
    """With nothing from attention and MLP the output is the residual; the next step reads it or its norm."""
    g, tokens = torch.randn(3, SHAPE.hidden_size), torch.tensor([3, 0, 14])
    for before_residual in (False, True):
        for output in (False, True):
            head = make_head(norm_before_residual=before_residual, norm_output=output)
            head.midlayer.self_attn.o_proj.weight.zero_()
            head.midlayer.mlp.down_proj.weight.zero_()
            hidden_norm = head.midlayer.hidden_norm.weight
            first, second = head.unroll(g, tokens, (3,), reads((3,), 2, [0, 1, 2]))
            expected = unit(g) * hidden_norm if before_residual else g
            torch.testing.assert_close(first, expected)
            expected = unit(expected) * head.norm.weight if output else expected
            torch.testing.assert_close(second, unit(expected) * hidden_norm if before_residual else expected)


def naive_step0(head: Eagle3Head, g: Tensor, tokens: Tensor) -> Tensor:
    """One conversation through the equations of the module's docstring, position by position. g: [seq, hidden]."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + SHAPE.rms_norm_eps).sqrt() * weight

    def turn(x: Tensor, position: int) -> Tensor:
        half = SHAPE.head_dim // 2
        out = torch.empty_like(x)
        for j in range(half):
            angle = position * SHAPE.rope_theta ** (-2 * j / SHAPE.head_dim)
            out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
            out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
        return out

    layer, dim = head.midlayer, SHAPE.head_dim
    queries, keys, values = [], [], []
    for t, token in enumerate(tokens.tolist()):
        x = torch.cat([rms(head.embeddings[token], layer.input_layernorm.weight), rms(g[t], layer.hidden_norm.weight)])
        q, k, v = (getattr(layer.self_attn, f"{name}_proj").weight @ x for name in "qkv")
        queries.append([turn(part, t) for part in q.split(dim)])
        keys.append([turn(part, t) for part in k.split(dim)])
        values.append(v.split(dim))
    outs = []
    for t in range(len(tokens)):
        heads = []
        for h in range(SHAPE.num_heads):
            shared = h // (SHAPE.num_heads // SHAPE.num_kv_heads)
            scores = torch.stack([queries[t][h] @ keys[s][shared] for s in range(t + 1)]) / dim**0.5
            heads.append(sum(p * values[s][shared] for s, p in enumerate(scores.softmax(0))))
        r = g[t] + layer.self_attn.o_proj.weight @ torch.cat(heads)
        x = rms(r, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        outs.append(r + mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ x) * (mlp.up_proj.weight @ x)))
    return torch.stack(outs)


def reads(lengths: tuple[int, ...], steps: int, rows: list[int]) -> Tensor:
    """All of `rows_ahead` at some rows."""
    return rows_ahead(lengths, steps, torch.device("cpu"))[0][:, rows]


@torch.no_grad()
def test_first_step_is_the_papers_layer() -> None:
    """Two documents; of the second only two rows are wanted."""
    head = make_head()
    g, tokens = torch.randn(9, SHAPE.hidden_size), torch.tensor([3, 0, 14, 3, 9, 1, 4, 4, 8])
    rows = [0, 1, 2, 3, 4, 5, 6, 8]
    (out,) = head.unroll(g, tokens, (6, 3), reads((6, 3), 1, rows))
    expected = torch.cat([naive_step0(head, g[:6], tokens[:6]), naive_step0(head, g[6:], tokens[6:])])[rows]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    normed = out / (out.square().mean(-1, keepdim=True) + SHAPE.rms_norm_eps).sqrt() * head.norm.weight
    torch.testing.assert_close(head.logits(out), normed @ head.lm_head.weight.T, atol=1e-5, rtol=1e-5)


LENGTHS = (4, 9, 1, 3)  # of four documents
SEQ, STEPS = sum(LENGTHS), 5


def with_one_embedding_a_row(head: Eagle3Head) -> Tensor:
    """Make row s read token s, so that each token's embedding has a gradient of its own. Returns the embeddings."""
    head.embeddings = torch.randn(SEQ, SHAPE.hidden_size, requires_grad=True)
    return head.embeddings


@pytest.mark.parametrize("step", range(STEPS))
def test_no_step_sees_the_future_or_another_document(step: int) -> None:
    """Step i at row t of a document knows features up to t and tokens up to its own, x_{t+1+i}; nothing else, not by
    the last bit."""
    head = make_head()
    embeddings = with_one_embedding_a_row(head)
    start = 4  # of the document of nine
    for t in range(9 - step):
        g = torch.randn(SEQ, SHAPE.hidden_size, requires_grad=True)
        outs = head.unroll(g, torch.arange(SEQ), LENGTHS, reads(LENGTHS, STEPS, list(range(SEQ))))
        of_g, of_tokens = torch.autograd.grad(outs[step][start + t].sum(), [g, embeddings])
        # Row s holds the features of s and the token s + 1.
        assert of_g.any(-1).nonzero()[:, 0].tolist() == list(range(start, start + t + 1))
        assert of_tokens.any(-1).nonzero()[:, 0].tolist() == list(range(start, start + t + step + 1))


ROWS = [list(range(SEQ)), [0, 3, 4, 5, 8, 12, 13, 15], [7], []]


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
VARIANTS: list[dict[str, object]] = [
    {},
    {"norm_before_residual": True},
    {"norm_output": True},
    {"norm_before_residual": True, "norm_output": True, "rope_scaling": YARN},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unroll_as_its_definition(steps: int, rows: list[int], variant: dict[str, object]) -> None:
    """By hand and by autograd: outputs and the gradient of everything that has one."""
    head = make_head(**variant)
    embeddings = with_one_embedding_a_row(head)
    g = torch.randn(SEQ, SHAPE.hidden_size, requires_grad=True)
    leaves = dict(head.midlayer.named_parameters()) | {"g": g, "embeddings": embeddings}
    if head.shape.norm_output and steps > 1:
        leaves["norm"] = head.norm.weight
    weights = torch.randn(steps, len(rows), SHAPE.hidden_size)
    found, expected = (
        function(g, torch.arange(SEQ), LENGTHS, reads(LENGTHS, steps, rows))
        for function in (head.unroll, head.unroll_reference)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    grads = (torch.autograd.grad((outs * weights).sum(), list(leaves.values())) for outs in (found, expected))
    for name, one, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0, msg=name)


def test_unroll_in_bfloat16_stays_near_its_definition_in_float32() -> None:
    """Under autocast, with float32 masters. A rounding in a step is carried through all that follow."""
    head, rows = make_head(), ROWS[1]
    with torch.no_grad():
        for parameter in head.midlayer.parameters():
            parameter.mul_(0.5)
    g, tokens = torch.randn(SEQ, SHAPE.hidden_size), torch.randint(15, (SEQ,))
    weights = torch.randn(STEPS, len(rows), SHAPE.hidden_size)
    parameters = dict(head.midlayer.named_parameters())

    def run(function: Callable[..., Tensor], low: bool) -> list[Tensor]:
        leaf = (g.bfloat16() if low else g).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            outs = function(leaf, tokens, LENGTHS, reads(LENGTHS, STEPS, rows))
        assert outs.dtype == leaf.dtype
        return [outs.detach(), *torch.autograd.grad((outs * weights).sum(), [leaf, *parameters.values()])]

    exact = run(head.unroll_reference, low=False)
    by_hand, by_autograd = run(head.unroll, low=True), run(head.unroll_reference, low=True)
    for name, one, other, right in zip(["out", "g", *parameters], by_hand, by_autograd, exact, strict=True):
        error, usual = (float((found.float() - right).norm() / right.norm()) for found in (one, other))
        assert error < max(0.01, 1.2 * usual), (name, error, usual)
        assert one.dtype == other.dtype


def test_a_graph_cannot_be_walked_twice() -> None:
    """Backward writes over what it was given; a second one must not take that for data."""
    head = make_head()
    out = head.unroll(torch.randn(4, SHAPE.hidden_size), torch.arange(4), (4,), reads((4,), 2, [0, 1])).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
