"""The block draft head (DFlash, arXiv 2602.06036): some layers that fill in a block of masked tokens in one pass.

    ctx   = hidden_norm(fc(concat of n target layers))           at every position the target has seen
    block = [anchor, MASK, .., MASK]                             the last emitted token, and the places to fill
    every layer: queries of the block; keys and values of [ctx before the anchor; the block], in both directions
    draft logits = lm_head(norm(block)), with the target's own frozen lm_head and embeddings

A layer is Qwen3's (RMSNorm on every query and key head); its `k_proj` and `v_proj` read ctx as it is and the block
behind `input_layernorm`. Positions are those of the text: ctx of position p is turned by p, and slot k of a block whose
anchor stands at position a by a + k. The anchor is in its block only: the target has not seen it yet. All of this is as
vLLM 0.32 (`qwen3_dflash`) and transformers (`DFlashTokenCandidateGenerator`) run it.

Slot k fills in its own position (DFlash: slots 1 .. B - 1 predict), or predicts the position behind it (DSpark: slots
0 .. B - 1 predict); the caller says which by `first_slot`.

Training has one block at each of many anchors. Blocks do not see each other, so they are computed some at a time, and
each time again in the backward pass: what is kept is linear in the text and in the blocks. `fill_reference` keeps
everything and takes one block at a time.

Module names are those of DFlash's published checkpoints, so a state dict without its buffers is the export.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sstf.heads.eagle import RmsNorm, positions_of, rotate
from sstf.heads.rope import rope_frequencies
from sstf.row_blocks import ROWS, filled

# Held at once: scores of attention in all heads, and slots.
SCORES_ON_CPU, SCORES = 2**22, 2**27
SLOTS_ON_CPU, SLOTS = 2**10, 2**14


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block head. Its hidden size is the target's, whose embeddings and lm_head it uses."""

    hidden_size: int
    taps: int  # size of the concatenated target features
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Mapping[str, Any] | None  # see `TargetSpec.rope_scaling`
    block_size: int  # slots, the anchor's included
    first_slot: int  # 1: slots fill in their own position; 0: each predicts the next one

    @property
    def drafts(self) -> int:
        """Tokens that one block predicts."""
        return self.block_size - self.first_slot


class BlockAttention(nn.Module):
    """Grouped-query attention with a norm on every query and key head, as in Qwen3."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        hidden, dim = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(hidden, shape.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * dim, hidden, bias=False)
        self.q_norm = RmsNorm(dim, shape.rms_norm_eps)
        self.k_norm = RmsNorm(dim, shape.rms_norm_eps)

    def query(self, x: Float[Tensor, "*rows hidden"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*rows heads dim"]:
        """Normed and turned; `cos` and `sin` as of `rotate`."""
        return rotate(self.q_norm(self._heads(self.q_proj(x))), cos, sin)

    def key_value(self, x: Float[Tensor, "*rows hidden"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Key (normed and turned) and value, [*rows, kv_heads, head_dim]."""
        return rotate(self.k_norm(self._heads(self.k_proj(x))), cos, sin), self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim))


class BlockMlp(nn.Module):
    """Qwen3's gated MLP."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class BlockLayer(nn.Module):
    """One decoder layer; attention itself is given by the caller (training has many blocks, decoding a cache)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = BlockAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = BlockMlp(shape)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the block's slots."""
        normed = self.input_layernorm(x)
        return self.self_attn.query(normed, cos, sin), *self.self_attn.key_value(normed, cos, sin)

    def finish(self, x: Float[Tensor, "*rows hidden"], attended: Float[Tensor, "*rows heads dim"]) -> Tensor:
        """Residuals and MLP behind the attention."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class BlockHead(nn.Module):
    """The head. Embeddings and lm_head are the target's, frozen and not part of the state dict.

    Logits of a draft are a function of its slot alone. Heads that correct them by the tokens drafted before
    (`block_corrections`) override the members at the end, which here correct nothing.

    `d2t` and `t2d` are as in `Eagle3Head`. `mask_token` [] int64 is the token whose embedding stands in for those to be
    filled in.
    """

    def __init__(
        self, shape: BlockShape, embeddings: Tensor, lm_head: Tensor, draft_tokens: Tensor, mask_token: int
    ) -> None:
        """Args:
        shape: sizes.
        embeddings: [vocab, hidden], the target's.
        lm_head: [vocab, hidden], the target's.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        mask_token: target id.
        """
        super().__init__()
        self.shape = shape
        self.frequencies, self.rope_scale = rope_frequencies(
            shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings
        )
        self.fc = nn.Linear(shape.taps, shape.hidden_size, bias=False)
        self.hidden_norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        whole = len(draft_tokens) == shape.vocab_size
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("lm_head", lm_head if whole else lm_head[draft_tokens], persistent=False)
        self.register_buffer("d2t", draft_tokens - torch.arange(len(draft_tokens), device=draft_tokens.device))
        t2d = torch.zeros(shape.vocab_size, dtype=torch.bool, device=draft_tokens.device)
        t2d[draft_tokens] = True
        self.register_buffer("t2d", t2d)
        self.register_buffer("mask_token", torch.tensor(mask_token, device=draft_tokens.device))
        self.embeddings: Tensor
        self.lm_head: Tensor
        self.d2t: Tensor
        self.t2d: Tensor
        self.mask_token: Tensor

    @property
    def draft_tokens(self) -> Int[Tensor, "draft_vocab"]:
        """Target ids of the draft vocabulary."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows hidden"]:
        """The target's embeddings, in the dtype of the head."""
        return F.embedding(tokens, self.embeddings).to(self.fc.weight.dtype)

    def block(self, anchors: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows slots hidden"]:
        """Embeddings of [anchor, MASK, ..]."""
        masks = self.mask_token.expand(*anchors.shape, self.shape.block_size - 1)
        return self.embed(torch.cat([anchors[..., None], masks], -1))

    def rope(self, positions: Int[Tensor, "*rows"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [*rows, 1, head_dim / 2], float32; no buffer, see `Eagle3Head.rope`."""
        angles = positions[..., None, None].float() * self.frequencies.to(positions.device)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def fuse(self, features: Float[Tensor, "*rows taps"]) -> Float[Tensor, "*rows hidden"]:
        """ctx of positions whose features the target computed, in the dtype of the head."""
        out: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return out

    def context(self, features: Float[Tensor, "*rows taps"], positions: Int[Tensor, "*rows"]) -> list[Tensor]:
        """Keys and values of ctx in every layer: key, value, key, .., each [*rows, kv_heads, head_dim]."""
        ctx, turn = self.fuse(features), self.rope(positions)
        return [part for layer in self.decoder for part in layer.self_attn.key_value(ctx, *turn)]

    @property
    def decoder(self) -> list[BlockLayer]:
        """The layers, for those who check types."""
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]

    # ---- training ----------------------------------------------------------------------------------------------------

    def fill(
        self,
        features: Float[Tensor, "seq taps"],
        tokens: Int[Tensor, "seq"],
        lengths: Sequence[int],
        rows: Sequence[int],
        scores: int | None = None,
    ) -> Float[Tensor, "row drafts hidden"]:
        """Blocks over packed documents: that of row t has its token x_{t+1} as anchor, at position t + 1, and sees
        ctx of rows 0 .. t of its own document.

        Args:
            features: of the target.
            tokens: x_{t+1}.
            lengths: rows of each document, see `FeatureBatch`.
            rows: ascending, at which there are blocks.
            scores: of attention, held at once.

        Returns:
            What `lm_head` reads, of the slots that predict.
        """
        on_cpu = features.device.type == "cpu"
        scores = scores or (SCORES_ON_CPU if on_cpu else SCORES)
        positions = positions_of(lengths, features.device)
        context = self.context(filled(features), filled(positions))
        slots = self.shape.block_size
        most = max(1, (SLOTS_ON_CPU if on_cpu else SLOTS) // slots)
        unit = max(1, ROWS // slots) if on_cpu else 1  # to whole blocks of rows, see `row_blocks`
        found = []
        # Without a row one is computed for nothing, so that the parameters have gradients.
        for start, end, keys in _chunks(list(rows) or [0], lengths, scores // (self.shape.num_heads * slots), most):
            some = list(rows[start:end]) or [0]
            some += [some[-1]] * (-len(some) % unit)
            at = torch.tensor(some, device=positions.device)
            keys = slice(keys.start, keys.start + -(-(keys.stop - keys.start) // ROWS) * ROWS) if on_cpu else keys
            out = checkpoint(
                self._fill_some, tokens[at], positions[at] + 1, at - keys.start, *(part[keys] for part in context),
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            found.append(out[: end - start])
        return torch.cat(found)[: len(rows)]

    def _fill_some(self, anchors: Tensor, at: Tensor, last: Tensor, *context: Tensor) -> Tensor:
        """[row, drafts, hidden] of anchors [row] at positions `at` [row]: each sees as many keys, up to `last`."""
        seen = torch.arange(len(context[0]), device=at.device)
        mask = (seen <= last[:, None]) & (seen > (last - at)[:, None])
        turn = self.rope(at[:, None] + torch.arange(self.shape.block_size, device=at.device))
        x = self.block(anchors)
        for layer, keys, values in zip(self.decoder, context[::2], context[1::2], strict=True):
            query, own_keys, own_values = layer.qkv(x, *turn)
            x = layer.finish(x, block_attention(query, own_keys, own_values, keys, values, mask))
        out: Tensor = self.norm(x[:, self.shape.first_slot :])
        return out

    def fill_reference(self, features: Tensor, tokens: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """`fill` by its definition, block by block."""
        positions = positions_of(lengths, features.device).tolist()
        found = []
        for row in rows:
            seen = torch.arange(row - positions[row], row + 1, device=features.device)
            own = positions[row] + 1 + torch.arange(self.shape.block_size, device=features.device)
            ctx = self.fuse(features[seen])
            x = self.block(tokens[row])
            for layer in self.decoder:
                query, *own_key_value = layer.qkv(x, *self.rope(own))
                past = layer.self_attn.key_value(ctx, *self.rope(seen - seen[0]))
                key, value = (
                    torch.cat(pair).repeat_interleave(query.shape[1] // pair[0].shape[1], 1)
                    for pair in zip(past, own_key_value, strict=True)
                )
                scores = torch.einsum("qhd,khd->hqk", query, key).float() * query.shape[-1] ** -0.5
                x = layer.finish(x, torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value))
            found.append(self.norm(x[self.shape.first_slot :]))
        return torch.stack(found)

    # ---- what the tokens drafted before change -----------------------------------------------------------------------

    @property
    def correction(self) -> Tensor | None:
        """[draft_vocab, rank], by which `low_rank` becomes logits; None: no correction."""
        return None

    def path_start(self, anchors: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows state"]:
        """What is remembered of a path that begins with its anchor."""
        return self.fc.weight.new_empty(*anchors.shape, 0)

    def path_next(
        self, state: Float[Tensor, "*rows state"], tokens: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows state"]:
        """What is remembered when a path goes on with `tokens`, target ids."""
        return state

    def low_rank(
        self, hidden: Float[Tensor, "*rows hidden"], state: Float[Tensor, "*rows state"]
    ) -> Float[Tensor, "*rows rank"]:
        """Of a slot with `hidden` behind a path with `state`."""
        return state

    def paths(self, tokens: Int[Tensor, "row drafts"]) -> Float[Tensor, "row drafts state"]:
        """States of training: those that draft i of a row is corrected by, after the row's tokens 0 .. i."""
        state = self.path_start(tokens[:, 0])
        states = [state]
        for i in range(1, tokens.shape[1]):
            state = self.path_next(state, tokens[:, i])
            states.append(state)
        return torch.stack(states, 1)


def block_attention(
    query: Float[Tensor, "row slots heads dim"],
    own_keys: Float[Tensor, "row slots kv_heads dim"],
    own_values: Float[Tensor, "row slots kv_heads dim"],
    keys: Float[Tensor, "seq kv_heads dim"],
    values: Float[Tensor, "seq kv_heads dim"],
    mask: Bool[Tensor, "row seq"],
) -> Float[Tensor, "row slots heads dim"]:
    """Attention of several blocks, each to the keys that `mask` shows it, which all of them share, and to its own.

    One softmax over both. A block's slots and a group's heads see the same keys, so they are rows of one product.
    """
    blocks, slots, heads, dim = query.shape
    shared = own_keys.shape[2]
    grouped = query.view(blocks, slots, shared, heads // shared, dim).permute(2, 0, 1, 3, 4).flatten(2, 3)
    past = torch.unflatten(grouped.flatten(1, 2) @ keys.permute(1, 2, 0), 1, (blocks, -1)).float()
    own = (grouped @ own_keys.permute(2, 0, 3, 1)).float()  # [kv_heads, row, slots * group, slots]
    past = past.masked_fill(~mask[None, :, None], float("-inf"))
    probs = (torch.cat([past, own], -1) * dim**-0.5).softmax(-1).to(own_values.dtype)
    seen = keys.shape[0]
    out = torch.unflatten(probs[..., :seen].flatten(1, 2) @ values.transpose(0, 1), 1, (blocks, -1))
    out = out + probs[..., seen:] @ own_values.permute(2, 0, 1, 3)
    return torch.unflatten(out, 2, (slots, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _chunks(rows: list[int], lengths: Sequence[int], each: int, most: int) -> list[tuple[int, int, slice]]:
    """Cut `rows`, ascending, so that there are at most `most`, and that blocks times keys stay within `each` (but for
    one block that is more): places from and to, and the keys that one of them may see, from the first one's document.

    >>> _chunks([0, 1, 2, 5, 6], (3, 4), 8, 9)
    [(0, 2, slice(0, 2, None)), (2, 3, slice(0, 3, None)), (3, 5, slice(3, 7, None))]
    """
    begins = [0, *accumulate(lengths)]
    found: list[tuple[int, int, slice]] = []
    start = 0
    for end in range(1, len(rows) + 1):
        begin = begins[bisect_right(begins, rows[start]) - 1]
        size = end + 1 - start
        if end < len(rows) and size <= most and size * (rows[end] + 1 - begin) <= each:
            continue
        found.append((start, end, slice(begin, rows[end - 1] + 1)))
        start = end
    return found
