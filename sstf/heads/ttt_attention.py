"""Attention of EAGLE-3's test-time training, exact and in linear memory.

At step i the query at position t sees the step-0 keys of positions 0..t, and of every later step j = 1..i only its
own key at t (what the decoder sees when it drafts i tokens from t; arXiv 2503.01840, figure 7). One softmax over both
sets. With flash attention over the first set giving `out_0` and its log-sum-exp `lse_0`, and the scores
s_j = q . k_j / sqrt(d):

    lse = logaddexp(lse_0, s_1, .., s_i)        out = exp(lse_0 - lse) out_0 + sum_j exp(s_j - lse) v_j

The backward pass of flash attention recomputes its probabilities as exp(q . k - lse) and needs, beside the gradient,
only sum(grad * out). Handing it the MERGED out and lse therefore gives the exact gradients of the step-0 part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def ttt_attention(
    query: Float[Tensor, "batch heads seq dim"],
    keys: Sequence[Float[Tensor, "batch kv_heads seq dim"]],
    values: Sequence[Float[Tensor, "batch kv_heads seq dim"]],
) -> Float[Tensor, "batch heads seq dim"]:
    """Attention of step `len(keys) - 1`; `keys[j]` and `values[j]` are those of step j."""
    if query.device.type == "cpu":
        out: Tensor = _FlashOnCpu.apply(query, len(keys), *keys, *values)  # type: ignore[no-untyped-call]
        return out
    return ttt_attention_reference(query, keys, values)


def ttt_attention_reference(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The same, written out with the whole [seq, seq] score matrix. Arguments as `ttt_attention`."""
    groups = query.shape[1] // keys[0].shape[1]
    seq = query.shape[2]
    scale = query.shape[-1] ** -0.5
    k = [key.repeat_interleave(groups, 1) for key in keys]
    v = [value.repeat_interleave(groups, 1) for value in values]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    scores = ((query @ k[0].mT).float() * scale).masked_fill(~causal, float("-inf"))
    diagonal = [((query * key).sum(-1, keepdim=True)).float() * scale for key in k[1:]]
    probs = torch.softmax(torch.cat([scores, *diagonal], -1), -1).to(query.dtype)
    out = probs[..., :seq] @ v[0]
    for j, value in enumerate(v[1:]):
        out = out + probs[..., seq + j, None] * value
    return out


class _FlashOnCpu(torch.autograd.Function):
    """`ttt_attention` over torch's CPU flash kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, steps: int, *keys_values: Tensor) -> Tensor:
        keys, values = keys_values[:steps], keys_values[steps:]
        groups = query.shape[1] // keys[0].shape[1]
        scale = query.shape[-1] ** -0.5
        query = query.contiguous()
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, _expand(keys[0], groups), _expand(values[0], groups), 0.0, True, scale=scale
        )
        if steps > 1:
            scores = torch.stack([_dot(query, key, groups) for key in keys[1:]]) * scale  # [step, batch, heads, seq]
            merged = torch.logsumexp(torch.cat([lse[None], scores]), 0)
            mixed = out.float() * (lse - merged).exp()[..., None]
            for score, value in zip(scores, values[1:], strict=True):
                mixed += _scale(value, (score - merged).exp(), groups)
            out, lse = mixed.to(query.dtype), merged
        ctx.save_for_backward(query, out, lse, *keys_values)
        ctx.steps, ctx.groups, ctx.scale = steps, groups, scale
        merged_out: Tensor = out
        return merged_out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *keys_values = ctx.saved_tensors
        groups, scale = ctx.groups, ctx.scale
        keys, values = keys_values[: ctx.steps], keys_values[ctx.steps :]
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, _expand(keys[0], groups), _expand(values[0], groups), out, lse, 0.0, True, scale=scale
        )
        grad_keys, grad_values = [_reduce(grad_key, groups)], [_reduce(grad_value, groups)]
        if ctx.steps > 1:
            grad_query = grad_query.float()
            delta = (grad.float() * out.float()).sum(-1)
            for key, value in zip(keys[1:], values[1:], strict=True):
                probs = (_dot(query, key, groups) * scale - lse).exp()
                grad_score = probs * (_dot(grad, value, groups) - delta) * scale
                grad_query += _scale(key, grad_score, groups)
                grad_keys.append(_reduce(query.float() * grad_score[..., None], groups).to(key.dtype))
                grad_values.append(_reduce(grad.float() * probs[..., None], groups).to(value.dtype))
        return grad_query.to(query.dtype), None, *grad_keys, *grad_values


def _expand(rows: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, seq, dim] -> [batch, heads, seq, dim]."""
    return rows.repeat_interleave(groups, 1) if groups > 1 else rows.contiguous()


def _reduce(rows: Tensor, groups: int) -> Tensor:
    """The transpose of `_expand`: sums the heads of each group."""
    return torch.unflatten(rows, 1, (-1, groups)).sum(2)


def _dot(rows: Tensor, key: Tensor, groups: int) -> Tensor:
    """[batch, heads, seq] float32: row times the key at its own position."""
    return (torch.unflatten(rows, 1, (-1, groups)).float() * key[:, :, None].float()).sum(-1).flatten(1, 2)


def _scale(value: Tensor, factor: Tensor, groups: int) -> Tensor:
    """[batch, heads, seq, dim] float32: the value at its own position times a factor per head."""
    return (value[:, :, None].float() * torch.unflatten(factor, 1, (-1, groups))[..., None]).flatten(1, 2)
