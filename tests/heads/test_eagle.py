from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sstf.heads import Eagle3Head, EagleShape
from sstf.heads.eagle import rotate

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


def make_head(seed: int = 0) -> Eagle3Head:
    torch.manual_seed(seed)
    head = Eagle3Head(SHAPE, torch.randn(SHAPE.vocab_size, SHAPE.hidden_size), DRAFT_TOKENS)
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
    torch.testing.assert_close(rotate(x, *make_head().rope(positions)), expected)


def test_rope_does_not_follow_the_head_into_low_precision() -> None:
    """Training keeps float32 positions under autocast; a decoder in bf16 must turn by the same angles."""
    positions = torch.tensor([[0, 100, 5000]])
    head = make_head()
    expected = head.rope(positions)
    for found, angles in zip(head.to(torch.bfloat16).rope(positions), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, angles)
    # The slowest of the three frequencies, by hand.
    slowest = SHAPE.rope_theta ** (-4 / 6)
    assert float(expected[0][0, 0, 1, 2]) == pytest.approx(math.cos(100 * slowest), abs=1e-5)


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


@torch.no_grad()
def test_first_step_is_the_papers_layer() -> None:
    head = make_head()
    g, tokens = torch.randn(1, 6, SHAPE.hidden_size), torch.tensor([[3, 0, 14, 3, 9, 1]])
    (out,) = head.unroll(g, [tokens])
    torch.testing.assert_close(out[0], naive_step0(head, g[0], tokens[0]), atol=1e-5, rtol=1e-5)
    normed = out / (out.square().mean(-1, keepdim=True) + SHAPE.rms_norm_eps).sqrt() * head.norm.weight
    torch.testing.assert_close(head.logits(out), normed @ head.lm_head.weight.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 1, 3])
def test_no_step_sees_the_future(step: int) -> None:
    """Step i at row t knows features up to t and tokens up to its own, x_{t+1+i}."""
    head = make_head()
    seq, t = 9, 4
    g, tokens = torch.randn(1, seq, SHAPE.hidden_size), torch.randint(0, 15, (1, seq + 4))
    steps = [tokens[:, i : i + seq] for i in range(5)]
    before = head.unroll(g, steps)[step]
    late_g, late_tokens = g.clone(), tokens.clone()
    late_g[:, t + 1 :] += 1
    late_tokens[:, t + step + 1 :] = (late_tokens[:, t + step + 1 :] + 1) % 15
    after = head.unroll(late_g, [late_tokens[:, i : i + seq] for i in range(5)])[step]
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1])
    assert not torch.allclose(after[:, t + 1], before[:, t + 1])  # so that the test could fail
    # And the last thing it may know, it does know.
    near = tokens.clone()
    near[:, t + step] = (near[:, t + step] + 1) % 15
    changed = head.unroll(g, [near[:, i : i + seq] for i in range(5)])[step]
    assert not torch.allclose(changed[:, t], before[:, t])
