from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sstf.heads.packed_flash import dense_backward, dense_forward, flash_backward, flash_forward
from sstf.heads.ttt_attention import Seen, ttt_attention, ttt_attention_backward, ttt_attention_reference

KV_HEADS, DIM = 2, 8
DOCUMENTS = [(1,), (2,), (17, 1, 2), (129,), (5, 130, 1, 64)]


@dataclass(frozen=True)
class Case:
    """Arguments, and a gradient of the output. `parts` are the query and what it sees."""

    parts: tuple[Tensor, ...]
    rows: Tensor
    lengths: tuple[int, ...]
    grad: Tensor

    def to(self, to: torch.dtype | str) -> Case:
        rows = self.rows if isinstance(to, torch.dtype) else self.rows.to(to)
        return Case(tuple(part.to(to) for part in self.parts), rows, self.lengths, self.grad.to(to))


def make_case(
    steps: int, groups: int, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, every: bool = True
) -> Case:
    """Of the last of `steps`. With `every`, a query at every row; else at about two thirds of them."""
    seq, heads = sum(lengths), KV_HEADS * groups
    generator = torch.Generator().manual_seed(100 * steps + seq)
    rows = torch.arange(seq)
    if not every:
        rows = rows[torch.rand(seq, generator=generator) < 0.67]

    def some(*shape: int) -> Tensor:
        # A wide spread, so that the softmax is far from uniform and the diagonal matters.
        return (torch.randn(*shape, DIM, generator=generator) * 1.5).to(dtype)

    whole, later = (seq, KV_HEADS), (len(rows), KV_HEADS, steps - 1)
    parts = (some(len(rows), heads), some(*whole), some(*whole), some(*later), some(*later))
    return Case(parts, rows, lengths, some(len(rows), heads))


def run(case: Case) -> list[Tensor]:
    """Output, then the gradients of the query, keys and values."""
    query, seen = case.parts[0], Seen(*case.parts[1:])
    out, lse = ttt_attention(query, seen, case.rows, case.lengths)
    assert lse.dtype == torch.float32
    of_query, of_seen = ttt_attention_backward(case.grad, query, seen, out, lse, case.rows, case.lengths)
    return [out, of_query, *vars(of_seen).values()]


def run_reference(case: Case) -> list[Tensor]:
    """The same by autograd."""
    leaves = [part.detach().requires_grad_() for part in case.parts]
    out = ttt_attention_reference(leaves[0], Seen(*leaves[1:]), case.rows, case.lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To 1e-5 of the largest entry: gradients are sums of terms that cancel."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max([1.0, *other.abs().flatten().tolist()]), rtol=0)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_as_reference(steps: int, groups: int, lengths: tuple[int, ...], every: bool) -> None:
    case = make_case(steps, groups, lengths, every=every)
    assert_same(run(case), run_reference(case))


@pytest.mark.parametrize("lengths", [*DOCUMENTS, (260, 30)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_bfloat16_stays_near_the_float32_reference(steps: int, groups: int, lengths: tuple[int, ...]) -> None:
    """Of documents on both sides of `SHORT`."""
    case = make_case(steps, groups, lengths, torch.bfloat16, every=len(lengths) == 1)
    for one, other in zip(run(case), run_reference(case.to(torch.float32)), strict=True):
        assert one.dtype == torch.bfloat16
        scale = other.norm().clamp_min(1e-3 * other.numel() ** 0.5)  # a gradient may be 0: one visible key
        assert float((one.float() - other).norm()) <= 0.02 * float(scale)


def test_by_the_definition() -> None:
    """Query t of step i: keys of its document up to t of step 0, then its own of steps 1..i; one softmax."""
    groups, lengths = 3, (4, 1, 5)
    case = make_case(3, groups, lengths, every=False)
    query, key, value, later_keys, later_values = case.parts
    starts = [0] * 4 + [4] + [5] * 5
    expected = torch.empty_like(query)
    for r, t in enumerate(case.rows.tolist()):
        for head in range(KV_HEADS * groups):
            shared = head // groups
            k = torch.cat([key[starts[t] : t + 1, shared], later_keys[r, shared]])
            v = torch.cat([value[starts[t] : t + 1, shared], later_values[r, shared]])
            expected[r, head] = torch.softmax(k @ query[r, head] / DIM**0.5, 0) @ v
    for found in (run(case)[0], run_reference(case)[0]):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = make_case(3, 1, (7, 2))
    query, key, value, later_keys, later_values = case.parts
    case = replace(case, parts=(query * 40, key * 40, value, later_keys * 40, later_values)).to(dtype)
    found = run(case)
    assert all(bool(rows.isfinite().all()) for rows in found)
    if dtype == torch.float32:
        torch.testing.assert_close(found[0], run_reference(case)[0], atol=1e-4, rtol=1e-4)


def test_rows_laid_out_as_one_projection_leaves_them() -> None:
    """Query, key and value side by side in one row: strided views, and a gradient that is one too."""
    case = make_case(3, 3, (7, 12))
    heads = 3 * KV_HEADS
    side_by_side = torch.cat(case.parts[:3], 1).split([heads, KV_HEADS, KV_HEADS], 1)
    grad = torch.cat([case.grad, case.grad], 1)[:, :heads]
    strided = replace(case, parts=(*side_by_side, *case.parts[3:]), grad=grad)
    assert not side_by_side[0].is_contiguous() and not grad.is_contiguous()
    assert_same(run(strided), run_reference(case))


# ---- the kernels behind it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seq", [1, 2, 17, 129])
def test_dense_kernel_as_the_flash_kernel(seq: int, groups: int) -> None:
    """`dense_*` are what other devices and short documents run; here the same document goes through both."""
    case = make_case(1, groups, (seq,))
    query, key, value, *_ = case.parts
    out, lse = flash_forward(query, key, value, (seq,))
    found = flash_backward(case.grad, query, key, value, out, lse, (seq,))

    def by_group(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3)

    q, k, v, grad = (by_group(rows) for rows in (query, key, value, case.grad))
    dense_out, dense_lse = dense_forward(q, k, v, DIM**-0.5)
    dense = dense_backward(grad, q, k, v, dense_out, dense_lse, DIM**-0.5)
    assert_same([by_group(rows) for rows in (out, lse[..., None], *found)], [dense_out, dense_lse[..., None], *dense])


@pytest.mark.parametrize("groups", [1, 4])
def test_shapes_of_the_cuda_kernel(groups: int) -> None:
    """By torch's own fake kernels: what is handed over and what comes back have the shapes that are relied on."""
    with FakeTensorMode():
        query = torch.empty(12, 2 * groups, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(12, 2, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = flash_forward(query, key, key, (5, 7))
        grads = flash_backward(query, query, key, key, out, lse, (5, 7))
    assert out.shape == query.shape and out.dtype == torch.bfloat16
    assert lse.shape == query.shape[:2] and lse.dtype == torch.float32
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_cuda_as_the_reference_on_a_cpu(groups: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(3, groups, lengths, dtype, every=False)
    close = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(run(case.to("cuda")), run_reference(case.to(torch.float32)), strict=True):
        scale = other.norm().clamp_min(1e-3 * other.numel() ** 0.5)
        assert float((one.float().cpu() - other).norm()) <= close * float(scale)
