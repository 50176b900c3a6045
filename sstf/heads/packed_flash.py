"""Causal attention inside each of several documents that stand one after the other, with its log-sum-exp.

`flash_forward` and `flash_backward` are a pair that a caller's autograd function is built from. The backward pass
recomputes the probabilities as exp(score - lse), so `out` and `lse` may be those of a softmax over MORE keys than
these (`ttt_attention`); the gradients are then exact for the part of these keys.

| device | dtype | kernel |
|---|---|---|
| CPU | any | torch's flash attention for CPUs, one document at a time, over strided views |
| CPU | bfloat16, backward of a document of `SHORT` rows or fewer | `dense_backward`, which is faster there |
| CUDA | bfloat16, float16 | flash attention over all documents at once, by cumulative lengths |
| other | any | `dense_forward` and `dense_backward`: one document at a time with its whole score matrix |

The grouping of heads is Llama's: query heads `i * groups .. (i + 1) * groups - 1` read the keys of kv_head i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 256  # measured on one core: 0.9 ms against 2.7 ms at 128 rows, 3.1 against 3.5 at 256, 21 against 10 at 512
_CUDA = torch.ops.aten._flash_attention_forward
_CUDA_BACKWARD = torch.ops.aten._flash_attention_backward


def flash_forward(
    query: Float[Tensor, "seq heads dim"],
    key: Float[Tensor, "seq kv_heads dim"],
    value: Float[Tensor, "seq kv_heads dim"],
    lengths: Sequence[int],
) -> tuple[Float[Tensor, "seq heads dim"], Float[Tensor, "seq heads"]]:
    """Attention output and, in float32, the log-sum-exp of the scores q . k / sqrt(dim).

    Args:
        query: any strides, as long as the last dimension is dense; `key` and `value` too.
        key: as `query`.
        value: as `query`.
        lengths: rows of each document, see `FeatureBatch`.
    """
    scale = query.shape[-1] ** -0.5
    if _has_cuda_kernel(query):
        ends, longest = _cumulative(lengths, query.device), max(lengths)
        out, lse, *_ = _CUDA(query, key, value, ends, ends, longest, longest, 0.0, True, False, scale=scale)
        return out, lse.T
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    groups = query.shape[1] // key.shape[1]
    parts = zip(*(rows.split(lengths) for rows in (query, key, value, out, lse)), strict=True)
    for q, k, v, out_part, lse_part in parts:
        forward = _cpu_forward if query.device.type == "cpu" else dense_forward
        found, found_lse = forward(_by_group(q, groups), _shared(k, groups), _shared(v, groups), scale)
        _by_group(out_part, groups).copy_(found)
        _by_group(lse_part[..., None], groups).copy_(found_lse[..., None])
    return out, lse


def flash_backward(
    grad: Float[Tensor, "seq heads dim"],
    query: Float[Tensor, "seq heads dim"],
    key: Float[Tensor, "seq kv_heads dim"],
    value: Float[Tensor, "seq kv_heads dim"],
    out: Float[Tensor, "seq heads dim"],
    lse: Float[Tensor, "seq heads"],
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; see the module docstring about `out` and `lse`."""
    scale = query.shape[-1] ** -0.5
    if _has_cuda_kernel(query):
        ends, longest = _cumulative(lengths, query.device), max(lengths)
        none = torch.empty(0, device=query.device)  # the random state of a dropout that there is not
        grads: tuple[Tensor, Tensor, Tensor] = _CUDA_BACKWARD(
            grad, query, key, value, out, lse.T.contiguous(), ends, ends, longest, longest, 0.0, True,
            torch.zeros(2, dtype=torch.uint64, device=query.device), none, scale=scale,
        )  # fmt: skip
        return grads
    grad_query, grad_key, grad_value = (
        torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (query, key, value)
    )
    groups = query.shape[1] // key.shape[1]
    parts = zip(
        *(rows.split(lengths) for rows in (grad, query, key, value, out, lse, grad_query, grad_key, grad_value)),
        strict=True,
    )
    for g, q, k, v, o, part, *into in parts:
        flash = q.device.type == "cpu" and (len(q) > SHORT or q.dtype != torch.bfloat16)
        backward = _cpu_backward if flash else dense_backward
        g, q, o, part = (_by_group(rows, groups) for rows in (g, q, o, part[..., None]))
        found = backward(g, q, _shared(k, groups), _shared(v, groups), o, part[..., 0], scale)
        _by_group(into[0], groups).copy_(found[0])
        for rows, of_head in zip(into[1:], found[1:], strict=True):
            rows.copy_(of_head.sum(1).transpose(0, 1))
    return grad_query, grad_key, grad_value


class PackedAttention(torch.autograd.Function):
    """`flash_forward`'s output, with its gradients: `apply(query, key, value, lengths)`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """See `flash_forward`."""
        out, lse = flash_forward(query, key, value, lengths)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.lengths = tuple(lengths)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """See `flash_backward`."""
        query, key, value, out, lse = ctx.saved_tensors
        return (*flash_backward(grad, query, key, value, out, lse, ctx.lengths), None)


def dense_forward(
    query: Float[Tensor, "kv_heads group seq dim"],
    key: Float[Tensor, "kv_heads group seq dim"],
    value: Float[Tensor, "kv_heads group seq dim"],
    scale: float,
) -> tuple[Float[Tensor, "kv_heads group seq dim"], Float[Tensor, "kv_heads group seq"]]:
    """One document, with its whole score matrix in float32: output and log-sum-exp. A group shares its keys."""
    shape, key, value = query.shape, key[:, 0], value[:, 0]
    scores = (query.float().flatten(1, 2) @ key.float().mT).mul_(scale).view(*shape[:3], -1)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    scores.masked_fill_(later, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    probs = scores.sub_(lse).exp_().to(value.dtype)
    return (probs.flatten(1, 2) @ value).view(shape), lse[..., 0]


def dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dense_forward`, by hand: d score = prob * (grad . value - grad . out). The group's gradients of
    keys and values come added up, [kv_heads, 1, seq, dim]."""
    shape, dtype, key, value = query.shape, query.dtype, key[:, 0], value[:, 0]
    scaled, wide = (query.float() * scale).flatten(1, 2), grad.float().flatten(1, 2)
    delta = (wide * out.flatten(1, 2)).sum(-1, keepdim=True)
    probs = torch.baddbmm(lse.flatten(1, 2)[..., None], scaled, key.float().mT, beta=-1).exp_()
    # Later keys: set, not multiplied, for their exponentials may be infinite.
    probs.view(-1, shape[2], shape[2]).tril_()
    of_scores = torch.baddbmm(delta, wide, value.float().mT, beta=-1).mul_(probs).to(dtype)
    of_key = of_scores.mT @ scaled.to(dtype)
    of_value = probs.to(dtype).mT @ wide.to(dtype)
    return (of_scores @ key).mul_(scale).view(shape), of_key[:, None], of_value[:, None]


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, True, scale=scale
    )
    return found


def _has_cuda_kernel(rows: Tensor) -> bool:
    return rows.device.type == "cuda" and rows.dtype in (torch.bfloat16, torch.float16)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[documents + 1] int32, where each begins and the last ends."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """[seq, heads, dim] -> a view [kv_heads, groups, seq, dim]: kv_heads as a batch, so that keys need no copies."""
    return torch.unflatten(rows, 1, (-1, groups)).permute(1, 2, 0, 3)


def _shared(rows: Tensor, groups: int) -> Tensor:
    """[seq, kv_heads, dim] -> a view [kv_heads, groups, seq, dim] of the same keys for each of the group."""
    return rows.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
