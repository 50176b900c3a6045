"""The EAGLE-3 draft head (arXiv 2503.01840, section 3): one decoder layer over fused target features.

    g_t   = fc([h_low; h_mid; h_high])                       3H -> H, at positions the target has seen
    a     = attention([input_layernorm(embed(x_{t+1})); hidden_norm(g_t)])      q, k, v read 2H
    r     = g_t + a
    out_t = r + mlp(post_attention_layernorm(r))             fed back as g in place of unseen target features
    draft logits = lm_head(norm(out_t))                      over the draft vocabulary

Module names are those of EAGLE's published checkpoints, so a state dict is the export.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads.ttt_attention import ttt_attention


@dataclass(frozen=True)
class EagleShape:
    """Sizes of an EAGLE-3 head."""

    hidden_size: int
    taps: int  # size of the concatenated target features
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    draft_vocab_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int


class RmsNorm(nn.RMSNorm):
    """RMSNorm whose weight follows its input's dtype: under autocast the master weight is float32, the input is not."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden], in the dtype of `x`."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class EagleAttention(nn.Module):
    """Grouped-query attention with rotary positions (Llama's layout), reading 2H."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * shape.hidden_size
        self.q_proj = nn.Linear(width, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value: [batch, heads or kv_heads, seq, head_dim]."""

        def heads(rows: Tensor) -> Tensor:
            return torch.unflatten(rows, -1, (-1, self.shape.head_dim)).transpose(1, 2)

        query, key = (rotate(heads(proj(x)), cos, sin) for proj in (self.q_proj, self.k_proj))
        return query, key, heads(self.v_proj(x))

    def merge(self, attended: Tensor) -> Tensor:
        """[batch, heads, seq, head_dim] -> [batch, seq, hidden]."""
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class EagleMlp(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class EagleLayer(nn.Module):
    """The one decoder layer; attention itself is given by the caller (training unrolls, decoding caches)."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        eps = shape.rms_norm_eps
        self.input_layernorm = RmsNorm(shape.hidden_size, eps)
        self.hidden_norm = RmsNorm(shape.hidden_size, eps)
        self.self_attn = EagleAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, eps)
        self.mlp = EagleMlp(shape)

    def qkv(self, embeds: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of [embeds; g]."""
        return self.self_attn.project(torch.cat([self.input_layernorm(embeds), self.hidden_norm(g)], -1), cos, sin)

    def finish(self, g: Tensor, attended: Tensor) -> Tensor:
        """Residuals and MLP behind the attention. The residual is the un-normed g."""
        r = g + self.self_attn.merge(attended)
        out: Tensor = r + self.mlp(self.post_attention_layernorm(r))
        return out


class Eagle3Head(nn.Module):
    """The head. The target's embeddings are frozen, shared, and not part of the state dict.

    `d2t` [draft_vocab] int64 is an OFFSET map (target id = draft id + d2t[draft id]); `t2d` [vocab] bool marks the
    target ids that the draft vocabulary holds.
    """

    def __init__(self, shape: EagleShape, embeddings: Tensor, draft_tokens: Tensor) -> None:
        """Args:
        shape: sizes.
        embeddings: [vocab, hidden], the target's.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        """
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(shape.taps, shape.hidden_size, bias=False)
        self.midlayer = EagleLayer(shape)
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("d2t", draft_tokens - torch.arange(len(draft_tokens), device=draft_tokens.device))
        t2d = torch.zeros(shape.vocab_size, dtype=torch.bool, device=draft_tokens.device)
        t2d[draft_tokens] = True
        self.register_buffer("t2d", t2d)
        self.embeddings: Tensor
        self.d2t: Tensor
        self.t2d: Tensor

    @property
    def draft_tokens(self) -> Int[Tensor, "draft_vocab"]:
        """Target ids of the draft vocabulary."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def embed(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """The target's embeddings, in the dtype of the head."""
        return F.embedding(tokens, self.embeddings).to(self.fc.weight.dtype)

    def rope(self, positions: Int[Tensor, "batch seq"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [batch, 1, seq, head_dim], float32."""
        # Made anew, not a buffer: `head.to(bfloat16)` would round it, and late positions would turn by whole radians.
        dim = self.shape.head_dim
        frequencies = self.shape.rope_theta ** -(torch.arange(0, dim, 2, device=positions.device).float() / dim)
        angles = positions[:, None, :, None].float() * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def unroll(
        self, g: Float[Tensor, "batch seq hidden"], tokens: list[Tensor]
    ) -> list[Float[Tensor, "batch seq hidden"]]:
        """Test-time training: step i reads `tokens[i]` at position t + i and the previous step's output.

        Args:
            g: fused target features, step 0's input.
            tokens: [batch, seq] for each step, x_{t+1+i}.

        Returns:
            `out` of each step, before the final norm.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outs: list[Tensor] = []
        start = torch.arange(g.shape[1], device=g.device)[None]
        for step, step_tokens in enumerate(tokens):
            query, key, value = self.midlayer.qkv(self.embed(step_tokens), g, *self.rope(start + step))
            keys.append(key)
            values.append(value)
            g = self.midlayer.finish(g, ttt_attention(query, keys, values))
            outs.append(g)
        return outs

    def logits(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of layer outputs."""
        logits: Tensor = self.lm_head(self.norm(out))
        return logits


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in Llama's half-split layout, computed in float32. x: [batch, heads, seq, head_dim]."""
    low, high = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)
