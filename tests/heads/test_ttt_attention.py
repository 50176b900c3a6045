from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sstf.heads import ttt_attention, ttt_attention_reference

KV_HEADS, DIM = 2, 8


def inputs(steps: int, groups: int, seq: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, keys and values of every step, and a gradient."""
    generator = torch.Generator().manual_seed(100 * steps + seq)

    def rows(heads: int) -> Tensor:
        # A wide spread, so that the softmax is far from uniform and the diagonal matters.
        return (torch.randn(2, heads, seq, DIM, generator=generator) * 1.5).to(dtype)

    return [rows(KV_HEADS * groups), *(rows(KV_HEADS) for _ in range(2 * steps)), rows(KV_HEADS * groups)]


def run(function: object, tensors: list[Tensor]) -> list[Tensor]:
    """Output, then the gradients of the query, every key and every value."""
    *leaves, grad = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    query, rest = leaves[0], leaves[1:]
    out = function(query, rest[: len(rest) // 2], rest[len(rest) // 2 :])  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("seq", [1, 7, 130])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_as_reference(steps: int, groups: int, seq: int) -> None:
    tensors = inputs(steps, groups, seq)
    found, expected = run(ttt_attention, tensors), run(ttt_attention_reference, tensors)
    assert len(found) == 2 + 2 * steps
    for one, other in zip(found, expected, strict=True):
        # Of the largest entry: gradients are sums of terms that cancel.
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


@pytest.mark.parametrize("seq", [1, 7, 130])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("steps", [1, 5])
def test_bfloat16_stays_near_the_float32_reference(steps: int, groups: int, seq: int) -> None:
    tensors = inputs(steps, groups, seq, torch.bfloat16)
    found = run(ttt_attention, tensors)
    expected = run(ttt_attention_reference, [tensor.float() for tensor in tensors])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        scale = other.norm().clamp_min(1e-3 * other.numel() ** 0.5)  # a gradient may be 0: one visible key
        assert float((one.float() - other).norm() / scale) < 0.02


def test_by_the_definition() -> None:
    """Query t of step i: keys 0..t of step 0, then its own of steps 1..i; one softmax."""
    steps, groups, seq = 3, 3, 5
    query, *rest, _ = inputs(steps, groups, seq)
    keys, values = rest[:steps], rest[steps:]
    expected = torch.empty_like(query)
    for b in range(2):
        for head in range(KV_HEADS * groups):
            shared = head // groups
            for t in range(seq):
                seen = [(0, s) for s in range(t + 1)] + [(step, t) for step in range(1, steps)]
                k = torch.stack([keys[step][b, shared, s] for step, s in seen])
                v = torch.stack([values[step][b, shared, s] for step, s in seen])
                expected[b, head, t] = torch.softmax(k @ query[b, head, t] / DIM**0.5, 0) @ v
    for function in (ttt_attention, ttt_attention_reference):
        torch.testing.assert_close(function(query, keys, values), expected, atol=1e-5, rtol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    query, *rest, grad = inputs(3, 1, 7)
    tensors = [query * 40, *(rows * 40 for rows in rest[:3]), *rest[3:], grad]
    found, expected = run(ttt_attention, tensors), run(ttt_attention_reference, tensors)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert all(bool(rows.isfinite().all()) for rows in found)


def test_rows_laid_out_as_the_projections_leave_them() -> None:
    """[batch, seq, heads, dim] transposed: neither inputs nor gradient are contiguous."""
    tensors = [rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in inputs(3, 3, 7)]
    for one, other in zip(run(ttt_attention, tensors), run(ttt_attention_reference, tensors), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
