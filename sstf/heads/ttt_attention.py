"""Attention of EAGLE-3's test-time training over packed documents, exact and in linear memory.

At step i the query at position t sees the step-0 keys of positions 0..t of its own document, and of every later step
j = 1..i only its own key at t (what the decoder sees when it drafts i tokens from t; arXiv 2503.01840, figure 7). One
softmax over both sets. With flash attention over the first set giving `out_0` and its log-sum-exp `lse_0`, and the
scores s_j = q . k_j / sqrt(d):

    lse = logaddexp(lse_0, s_1, .., s_i)        out = exp(lse_0 - lse) out_0 + sum_j exp(s_j - lse) v_j

The backward pass of flash attention recomputes its probabilities as exp(q . k - lse) and needs, beside the gradient,
only sum(grad * out). Handing it the MERGED out and lse therefore gives the exact gradients of the step-0 part.

Keys of step 0 exist at every position; queries, and keys of later steps, only at the `rows` that are learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sstf.heads.packed_flash import flash_backward, flash_forward


@dataclass(frozen=True)
class Seen:
    """Keys and values of one step's queries, those of later steps side by side. Also used for their gradients."""

    key: Float[Tensor, "seq kv_heads dim"]  # of step 0
    value: Float[Tensor, "seq kv_heads dim"]
    later_keys: Float[Tensor, "row kv_heads step dim"]  # of steps 1 up to that of the query; none at step 0
    later_values: Float[Tensor, "row kv_heads step dim"]


def ttt_attention(
    query: Float[Tensor, "row heads dim"], seen: Seen, rows: Int[Tensor, "row"], lengths: Sequence[int]
) -> tuple[Float[Tensor, "row heads dim"], Float[Tensor, "row heads"]]:
    """Attention of one step, and the log-sum-exp of its scores in float32. Autograd does not see it.

    Args:
        query: of this step.
        seen: what it may look at.
        rows: where the queries stand in [seq], ascending.
        lengths: rows of each document in [seq], see `FeatureBatch`.
    """
    whole, whole_lse = flash_forward(spread(query, rows, len(seen.key)), seen.key, seen.value, lengths)
    out, lse = pick(whole, rows), pick(whole_lse, rows)
    if seen.later_keys.shape[2] == 0:
        return out, lse
    grouped, grouped_lse = _by_group(query, seen), _by_group(lse[..., None], seen)
    scores = torch.cat([grouped_lse, _later_scores(grouped, seen)], -1)  # [row, kv_heads, group, 1 + step]
    merged = scores.logsumexp(-1, keepdim=True)
    shares = scores.sub_(merged).exp_()
    # Rounded as the flash kernels round their probabilities.
    later = shares[..., 1:].to(query.dtype) @ seen.later_values
    out = (_by_group(out, seen) * shares[..., :1]).add_(later).to(query.dtype)
    return out.flatten(1, 2), merged.flatten(1)


def ttt_attention_backward(
    grad: Float[Tensor, "row heads dim"],
    query: Float[Tensor, "row heads dim"],
    seen: Seen,
    out: Float[Tensor, "row heads dim"],
    lse: Float[Tensor, "row heads"],
    rows: Int[Tensor, "row"],
    lengths: Sequence[int],
) -> tuple[Float[Tensor, "row heads dim"], Seen]:
    """Gradients of the query and of what it saw. `out` and `lse` are what `ttt_attention` returned."""
    seq = len(seen.key)
    # Rows without a query take no part: their gradient is zero, and so is all that comes of it.
    of_query, of_key, of_value = flash_backward(
        spread(grad, rows, seq), spread(query, rows, seq), seen.key, seen.value, spread(out, rows, seq),
        spread(lse, rows, seq), lengths,
    )  # fmt: skip
    of_query = pick(of_query, rows)
    if seen.later_keys.shape[2] == 0:
        return of_query, Seen(of_key, of_value, seen.later_keys, seen.later_values)
    dtype = query.dtype
    grouped, grouped_grad = _by_group(query, seen), _by_group(grad, seen)
    delta = (grad.float() * out).sum(-1)
    probs = _later_scores(grouped, seen).sub_(_by_group(lse[..., None], seen)).exp_()
    of_probs = grouped_grad.float() @ seen.later_values.float().mT
    of_scores = of_probs.sub_(_by_group(delta[..., None], seen)).mul_(probs).mul_(query.shape[-1] ** -0.5).to(dtype)
    of_query = of_query + (of_scores @ seen.later_keys).flatten(1, 2)
    return of_query, Seen(of_key, of_value, of_scores.mT @ grouped, probs.to(dtype).mT @ grouped_grad)


def ttt_attention_reference(query: Tensor, seen: Seen, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """`ttt_attention`'s output with a mask over the whole score matrix, for autograd."""
    groups, scale = query.shape[1] // seen.key.shape[1], query.shape[-1] ** -0.5
    k, v, later_k, later_v = (
        part.repeat_interleave(groups, 1) for part in (seen.key, seen.value, seen.later_keys, seen.later_values)
    )
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(query.device)
    at = torch.arange(len(document), device=query.device)
    visible = (document[rows, None] == document) & (at <= rows[:, None])  # [row, seq]
    scores = torch.einsum("rhd,shd->rhs", query, k).float() * scale
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    later = torch.einsum("rhd,rhjd->rhj", query, later_k).float() * scale
    probs = torch.softmax(torch.cat([scores, later], -1), -1).to(query.dtype)
    return torch.einsum("rhs,shd->rhd", probs[..., : len(at)], v) + torch.einsum(
        "rhj,rhjd->rhd", probs[..., len(at) :], later_v
    )


def spread(part: Tensor, rows: Tensor, seq: int) -> Tensor:
    """[row, ...] at its places in [seq, ...], zeros elsewhere."""
    return part if len(rows) == seq else part.new_zeros(seq, *part.shape[1:]).index_copy_(0, rows, part)


def pick(whole: Tensor, rows: Tensor) -> Tensor:
    """The transpose of `spread`."""
    return whole if len(rows) == len(whole) else whole.index_select(0, rows)


def _by_group(part: Tensor, seen: Seen) -> Tensor:
    """[row, heads, dim] -> a view [row, kv_heads, group, dim]."""
    return torch.unflatten(part, 1, (seen.key.shape[1], -1))


def _later_scores(grouped: Tensor, seen: Seen) -> Tensor:
    """[row, kv_heads, group, step] float32."""
    # In float32: a score rounded to bfloat16 would be off by percents after the exponential.
    scores: Tensor = grouped.float() @ seen.later_keys.float().mT
    return scores.mul_(grouped.shape[-1] ** -0.5)
