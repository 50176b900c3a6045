"""Kangaroo's adapter (arXiv 2404.18911, section 3.1): one attention and two norms between an early layer of the target
and its frozen lm_head, and an MLP where it is asked for.

    r   = h_t + attention(input_layernorm(h_t))            causal over the states h_0 .. h_t of the exit layer
    out = r + mlp(post_attention_layernorm(r))             or r, as in the paper
    draft logits = lm_head(norm(out))                      of x_{t+1}, over the draft vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads.eagle import RmsNorm, positions_of, rotate
from sstf.heads.packed_flash import PackedAttention
from sstf.heads.rope import rope_frequencies
from sstf.targets import PreallocatedCache


@dataclass(frozen=True)
class ExitShape:
    """Sizes of an adapter; those of the target's layers. `intermediate_size` None: there is no MLP."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int | None
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Mapping[str, Any] | None = None  # see `TargetSpec.rope_scaling`


class ExitAttention(nn.Module):
    """Grouped-query attention with rotary positions, in Llama's layout."""

    def __init__(self, shape: ExitShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, dim = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(hidden, shape.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * dim, hidden, bias=False)

    def split(self, rows: Float[Tensor, "*rows wide"]) -> Float[Tensor, "*rows heads dim"]:
        """By heads."""
        return torch.unflatten(rows, -1, (-1, self.shape.head_dim))


class ExitMlp(nn.Module):
    """Llama's gated MLP, with the norm in front of it."""

    def __init__(self, hidden: int, wide: int, eps: float) -> None:
        super().__init__()
        self.norm = RmsNorm(hidden, eps)
        self.gate_proj = nn.Linear(hidden, wide, bias=False)
        self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What is added to `x`."""
        normed = self.norm(x)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return out


class EarlyExitHead(nn.Module):
    """The adapter. The target's lm_head is frozen, shared where it is whole, and not part of the state dict.

    `d2t` and `t2d` are as in `Eagle3Head`.
    """

    def __init__(self, shape: ExitShape, lm_head: Tensor, draft_tokens: Tensor) -> None:
        """Args:
        shape: sizes.
        lm_head: [vocab, hidden], the target's.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        """
        super().__init__()
        self.shape = shape
        self.frequencies, self.rope_scale = rope_frequencies(
            shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings
        )
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = ExitAttention(shape)
        if shape.intermediate_size:
            self.mlp = ExitMlp(shape.hidden_size, shape.intermediate_size, shape.rms_norm_eps)
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        whole = len(draft_tokens) == len(lm_head)
        self.register_buffer("lm_head", lm_head if whole else lm_head[draft_tokens], persistent=False)
        self.register_buffer("d2t", draft_tokens - torch.arange(len(draft_tokens), device=draft_tokens.device))
        t2d = torch.zeros(shape.vocab_size, dtype=torch.bool, device=draft_tokens.device)
        t2d[draft_tokens] = True
        self.register_buffer("t2d", t2d)
        self.lm_head: Tensor
        self.d2t: Tensor
        self.t2d: Tensor

    @property
    def draft_tokens(self) -> Int[Tensor, "draft_vocab"]:
        """Target ids of the draft vocabulary."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def rope(self, positions: Int[Tensor, "*rows"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [*rows, 1, head_dim / 2], float32."""
        # No buffer: `head.to(bfloat16)` would round the frequencies, and late positions would turn by whole radians.
        angles = positions[..., None, None].float() * self.frequencies.to(positions.device)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def forward(self, states: Float[Tensor, "seq hidden"], lengths: Sequence[int]) -> Float[Tensor, "seq hidden"]:
        """Over packed documents, before the final norm; attention and positions are each document's own.

        Args:
            states: outputs of the exit layer.
            lengths: rows of each document, see `FeatureBatch`.
        """
        attention = self.self_attn
        states = states.to(attention.q_proj.weight.dtype)
        normed = self.input_layernorm(states)
        turn = self.rope(positions_of(lengths, states.device))
        query, key = (rotate(attention.split(proj(normed)), *turn) for proj in (attention.q_proj, attention.k_proj))
        value = attention.split(attention.v_proj(normed))
        attended: Tensor = PackedAttention.apply(query, key, value, lengths)  # type: ignore[no-untyped-call]
        return self.finish(states + attention.o_proj(attended.flatten(1)))

    def finish(self, r: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What stands behind the attention."""
        if not self.shape.intermediate_size:
            return r
        out: Tensor = r + self.mlp(r)
        return out

    def logits(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of what `forward` returns."""
        normed: Tensor = self.norm(out)
        return F.linear(normed, self.lm_head.to(normed.dtype))


class FusedExit:
    """The adapter in the form that drafts, over the head's weights as they are now."""

    def __init__(self, head: EarlyExitHead) -> None:
        attention, shape = head.self_attn, head.shape
        self.head, self.shape = head, shape
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.qkv = torch.cat(weights).detach()
        self.kv = self.qkv[shape.num_heads * shape.head_dim :]
        self.in_norm, self.norm = (
            norm.weight.detach() for norm in (head.input_layernorm, head.norm) if norm.weight is not None
        )
        self.cos = self.sin = torch.empty(0)

    def make_rope(self, capacity: int) -> None:
        """Rotary tables for positions below `capacity`."""
        self.cos, self.sin = self.head.rope(torch.arange(capacity, device=self.qkv.device))

    def remember(
        self, states: Float[Tensor, "row hidden"], slots: Int[Tensor, "row"], positions: Int[Tensor, "row"],
        cache: PreallocatedCache,
    ) -> None:  # fmt: skip
        """Put the keys and values of rows of the text where they belong; nobody asks there."""
        shape = self.shape
        kv = torch.unflatten(F.linear(self._norm(states, self.in_norm), self.kv), -1, (-1, shape.head_dim))
        key = rotate(kv[:, : shape.num_kv_heads], self.cos[positions], self.sin[positions])
        cache.write_rows(slots, positions[:, None], 0)
        cache.update(key[:, :, None], kv[:, shape.num_kv_heads :, None], 0)

    def __call__(
        self,
        states: Float[Tensor, "batch width hidden"],
        positions: Int[Tensor, "batch width"],
        mask: Bool[Tensor, "batch width visible"],
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch width hidden"]:
        """What `EarlyExitHead.forward` returns; keys and values go where `cache` was told to put them."""
        shape = self.shape
        qkv = torch.unflatten(F.linear(self._norm(states, self.in_norm), self.qkv), -1, (-1, shape.head_dim))
        query_key = shape.num_heads + shape.num_kv_heads
        turned = rotate(qkv[:, :, :query_key], self.cos[positions], self.sin[positions]).transpose(1, 2)
        keys, values = cache.update(turned[:, shape.num_heads :], qkv[:, :, query_key:].transpose(1, 2), 0)
        attended = F.scaled_dot_product_attention(
            turned[:, : shape.num_heads], keys, values, attn_mask=mask[:, None], enable_gqa=True
        )
        return self.head.finish(
            states + F.linear(attended.transpose(1, 2).flatten(2), self.head.self_attn.o_proj.weight)
        )

    def logits(self, out: Float[Tensor, "batch width hidden"]) -> Float[Tensor, "batch width draft_vocab"]:
        """Draft logits of outputs."""
        return F.linear(self._norm(out, self.norm), self.head.lm_head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)
