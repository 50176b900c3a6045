"""The EAGLE-3 draft head (arXiv 2503.01840, section 3): a decoder layer over fused target features.

    g_t   = fc([h_low; h_mid; h_high])                       3H -> H, at positions the target has seen
    a     = attention([input_layernorm(embed(x_{t+1})); hidden_norm(g_t)])      q, k, v read 2H
    r     = g_t + a
    out_t = r + mlp(post_attention_layernorm(r))             fed back as g in place of unseen target features
    draft logits = lm_head(norm(out_t))                      over the draft vocabulary

Published heads vary it: `norm_before_residual` adds a to hidden_norm(g_t) in place of g_t; `norm_before_fc` norms what
fc reads as a whole and `fc_norm` each layer's part of it; `norm_output` feeds norm(out_t) back. The last two are
EAGLE-3.1. Names are those of vLLM's and speculators' configurations. With `num_layers` above one, plain Llama layers
over H follow, each reading the output of the one before.

Module names are those of EAGLE's published checkpoints, so a state dict is the export; vLLM reads the layers as
`midlayer`, `layers.1`, `layers.2` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads.by_hand import Rms
from sstf.heads.rollout import Attend, Rollout, attend, attend_reference
from sstf.heads.rope import rope_frequencies
from sstf.heads.unroll import UnrollPlan, UnrollStates, UnrollWeights, unroll, unroll_states

T = TypeVar("T")


@dataclass(frozen=True)
class EagleShape:
    """Sizes of an EAGLE head, and which variant it is; see the module docstring."""

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
    rope_scaling: Mapping[str, Any] | None = None  # see `TargetSpec.rope_scaling`
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    num_layers: int = 1


class RmsNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, which under autocast is not that of the master weight; backward keeps its
    input alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden], in the dtype of `x`."""
        assert self.weight is not None
        out: Tensor = Rms.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class EagleAttention(nn.Module):
    """Grouped-query attention with rotary positions (Llama's layout), reading `width` numbers a row."""

    def __init__(self, shape: EagleShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(width, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value: [row, heads or kv_heads, head_dim] of x [row, width]."""

        def heads(rows: Tensor) -> Tensor:
            return torch.unflatten(rows, -1, (-1, self.shape.head_dim))

        query, key = (rotate(heads(proj(x)), cos, sin) for proj in (self.q_proj, self.k_proj))
        return query, key, heads(self.v_proj(x))

    def merge(self, attended: Tensor) -> Tensor:
        """[row, heads, head_dim] -> [row, hidden]."""
        out: Tensor = self.o_proj(attended.flatten(1))
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
    """The first decoder layer; attention itself is given by the caller (training unrolls, decoding caches)."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        eps = shape.rms_norm_eps
        self.norm_before_residual = shape.norm_before_residual
        self.input_layernorm = RmsNorm(shape.hidden_size, eps)
        self.hidden_norm = RmsNorm(shape.hidden_size, eps)
        self.self_attn = EagleAttention(shape, 2 * shape.hidden_size)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, eps)
        self.mlp = EagleMlp(shape)

    def qkv(self, embeds: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of [embeds; g]."""
        return self.self_attn.project(torch.cat([self.input_layernorm(embeds), self.hidden_norm(g)], -1), cos, sin)

    def finish(self, g: Tensor, attended: Tensor) -> Tensor:
        """Residuals and MLP behind the attention."""
        r = (self.hidden_norm(g) if self.norm_before_residual else g) + self.self_attn.merge(attended)
        out: Tensor = r + self.mlp(self.post_attention_layernorm(r))
        return out


class PlainLayer(nn.Module):
    """Llama's decoder layer, with attention given by the caller as in `EagleLayer`. EAGLE-1's first one does not norm
    what it reads (`input_norm` False)."""

    def __init__(self, shape: EagleShape, input_norm: bool = True) -> None:
        super().__init__()
        eps = shape.rms_norm_eps
        if input_norm:
            self.input_layernorm = RmsNorm(shape.hidden_size, eps)
        self.input_norm = input_norm
        self.self_attn = EagleAttention(shape, shape.hidden_size)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, eps)
        self.mlp = EagleMlp(shape)

    def qkv(self, embeds: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of x alone: the embeddings went in before."""
        return self.self_attn.project(self.input_layernorm(x) if self.input_norm else x, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residuals and MLP behind the attention."""
        r = x + self.self_attn.merge(attended)
        out: Tensor = r + self.mlp(self.post_attention_layernorm(r))
        return out


class EagleModule(nn.Module):
    """What every EAGLE head has. The target's embeddings are frozen, shared, and not part of the state dict.

    `d2t` [draft_vocab] int64 is an OFFSET map (target id = draft id + d2t[draft id]); `t2d` [vocab] bool marks the
    target ids that the draft vocabulary holds.
    """

    fc: nn.Linear

    def __init__(self, shape: EagleShape, embeddings: Tensor, draft_tokens: Tensor) -> None:
        """Args:
        shape: sizes.
        embeddings: [vocab, hidden], the target's.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        """
        super().__init__()
        self.shape = shape
        self.frequencies, self.rope_scale = rope_frequencies(
            shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings
        )
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

    def embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows hidden"]:
        """The target's embeddings, in the dtype of the head."""
        return F.embedding(tokens, self.embeddings).to(self.fc.weight.dtype)

    def rope(self, positions: Int[Tensor, "*rows"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [*rows, 1, head_dim / 2], float32."""
        # No buffer: `head.to(bfloat16)` would round the frequencies, and late positions would turn by whole radians.
        angles = positions[..., None, None].float() * self.frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.rope_scale == 1 else (cos * self.rope_scale, sin * self.rope_scale)


class Eagle3Head(EagleModule):
    """The head."""

    def __init__(self, shape: EagleShape, embeddings: Tensor, draft_tokens: Tensor) -> None:
        """See `EagleModule`."""
        super().__init__(shape, embeddings, draft_tokens)
        if shape.norm_before_fc:
            self.input_norm = RmsNorm(shape.taps, shape.rms_norm_eps)
        if shape.fc_norm:
            layers = shape.taps // shape.hidden_size
            self.fc_norm = nn.ModuleList(RmsNorm(shape.hidden_size, shape.rms_norm_eps) for _ in range(layers))
        self.fc = nn.Linear(shape.taps, shape.hidden_size, bias=False)
        self.midlayer = EagleLayer(shape)
        self.layers = nn.ModuleDict({str(i): PlainLayer(shape) for i in range(1, shape.num_layers)})
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)

    @property
    def later_layers(self) -> list[PlainLayer]:
        """Those above the first."""
        return [layer for layer in self.layers.values() if isinstance(layer, PlainLayer)]

    def fuse(self, features: Float[Tensor, "*rows taps"]) -> Float[Tensor, "*rows hidden"]:
        """g of positions whose features the target computed, in the dtype of the head."""
        x = features.to(self.fc.weight.dtype)
        if self.shape.norm_before_fc:
            x = self.input_norm(x)
        if self.shape.fc_norm:
            parts = x.split(self.shape.hidden_size, -1)
            x = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        out: Tensor = self.fc(x)
        return out

    def fed_back(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What stands in for g where the target has not been."""
        return self.norm(out) if self.shape.norm_output else out

    def unroll(
        self,
        g: Float[Tensor, "seq hidden"],
        tokens: Int[Tensor, "seq"],
        lengths: Sequence[int],
        reads: Int[Tensor, "steps row"],
    ) -> Float[Tensor, "steps row hidden"]:
        """Test-time training over packed documents: step i at row t reads token x_{t+1+i} at position t + i and the
        previous step's output. Attention and positions are each document's own.

        Args:
            g: fused target features, step 0's input.
            tokens: x_{t+1}.
            lengths: rows of each document, see `FeatureBatch`.
            reads: `reads[0]`, ascending, are the rows that are learned from; the head computes no others (but for
                step 0's keys and values). `reads[i]` are the rows whose tokens they read at step i, see `rows_ahead`.

        Returns:
            `out` of each step, before the final norm. Its graph can be walked once.
        """
        if self.shape.num_layers > 1:
            return self._by_autograd(attend, g, tokens, lengths, reads)
        return self._unrolled(unroll, g, tokens, lengths, reads)

    def unroll_states(self, g: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> UnrollStates:
        """`unroll` of a head of one layer, with what stands between attention and MLP; without a graph."""
        assert self.shape.num_layers == 1
        return self._unrolled(unroll_states, g, tokens, lengths, reads)

    def _unrolled(
        self,
        run: Callable[[Tensor, Tensor, UnrollWeights, UnrollPlan], T],
        g: Tensor,
        tokens: Tensor,
        lengths: Sequence[int],
        reads: Tensor,
    ) -> T:
        layer, hidden = self.midlayer, self.shape.hidden_size
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        of_token, of_state = qkv.split(hidden, 1)
        weights = UnrollWeights(
            hidden_norm=layer.hidden_norm.weight,
            qkv=of_state,
            o=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
            out_norm=self.norm.weight,
        )
        from_tokens = F.linear(layer.input_layernorm(self.embed(tokens).to(g.dtype)), of_token)
        position = positions_of(lengths, g.device)
        turns = [self.rope(position), *(self.rope(position[reads[0]] + step) for step in range(1, len(reads)))]
        shape = self.shape
        plan = UnrollPlan(
            reads, tuple(lengths), turns, shape.num_heads, shape.num_kv_heads, shape.rms_norm_eps,
            shape.norm_before_residual, shape.norm_output,
        )  # fmt: skip
        return run(g, from_tokens, weights, plan)

    def unroll_reference(self, g: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> Tensor:
        """`unroll` by its definition, differentiated by autograd; memory grows with the square of `seq`."""
        return self._by_autograd(attend_reference, g, tokens, lengths, reads)

    def _by_autograd(self, how: Attend, g: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> Tensor:
        rows, position = reads[0], positions_of(lengths, g.device)
        rollout = Rollout([self.midlayer, *self.later_layers], rows, lengths, how)
        outs = [rollout.start(self.embed(tokens).to(g.dtype), g, *self.rope(position))]
        for step, read in enumerate(reads[1:], start=1):
            embeds = self.embed(tokens[read]).to(g.dtype)
            outs.append(rollout.step(embeds, self.fed_back(outs[-1]), *self.rope(position[rows] + step)))
        return torch.stack(outs)

    def logits(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of layer outputs."""
        logits: Tensor = self.lm_head(self.norm(out))
        return logits


def positions_of(lengths: Sequence[int], device: torch.device) -> Int[Tensor, "seq"]:
    """Of each row in its own document."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in Llama's half-split layout, computed in float32.

    Args:
        x: [*rows, heads, head_dim].
        cos: [*rows, 1, head_dim / 2], see `Eagle3Head.rope`; `sin` too.
        sin: see `cos`.
    """
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
