"""The fused form against the eager one, and what it does not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from loss_cases import OBJECTIVES, rows_of
from torch import Tensor

from sstf.losses import Added, Distilled, Kl, LkHybrid, Objective, Teacher, Teachers, distill, fused_distill, teacher
from sstf.losses import fused as fused_module
from sstf.losses import teachers as teachers_module

Case = tuple[Tensor, Tensor, Teachers, Tensor, Tensor]


def random_case(rows: int, repeats: int, dtype: torch.dtype = torch.float32, vocab: int = 11) -> Case:
    """`rows` teacher rows, each asked for about `repeats` times in a shuffled order, as the steps of TTT do."""
    generator = torch.Generator().manual_seed(rows)
    count, width = rows * repeats, 5
    wide = torch.promote_types(dtype, torch.float32)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(wide).requires_grad_()
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64).to(wide) * 2
    target = teacher(logits, logits.logsumexp(-1) + 0.3)
    chosen = torch.randint(rows, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    return hidden, weight, partial(rows_of, target), chosen, weights


def gradients(result: Distilled, *leaves: Tensor) -> list[Tensor]:
    # Times 3: what stands behind the loss in the graph must reach the leaves.
    return list(torch.autograd.grad(3 * result.loss_sum, leaves))


def assert_same(case: Case, objective: Objective, chunk: int, atol: float, rtol: float) -> None:
    hidden, weight, *_ = case
    eager = distill(*case, objective)
    fused = fused_distill(*case, objective, chunk)
    for name in ("loss_sum", "losses", "draft_token", "overlap"):
        torch.testing.assert_close(getattr(fused, name), getattr(eager, name), atol=atol, rtol=rtol, msg=name)
    for found, expected in zip(gradients(fused, hidden, weight), gradients(eager, hidden, weight), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("chunk", [1, 6, 7, 12, 512])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_fused_is_eager(objective: Objective, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers_module, "CACHED", 4 * 11)  # blocks of four rows
    monkeypatch.setattr(fused_module, "TOKENS", 4)
    assert_same(random_case(4, 3), objective, chunk, atol=1e-5, rtol=1e-5)
    assert_same(random_case(4, 3, torch.float64), objective, chunk, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_matrix_adds_to_the_logits(frozen: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first one frozen (its gradient is then not computed) or trained."""
    monkeypatch.setattr(fused_module, "TOKENS", 4)
    hidden, weight, *rest = random_case(4, 3, dtype)
    generator = torch.Generator().manual_seed(9)
    states = torch.randn(len(hidden), 3, generator=generator, dtype=dtype).requires_grad_()
    second = torch.randn(11, 3, generator=generator, dtype=dtype).requires_grad_()
    weight = weight.detach() if frozen else weight
    leaves = [hidden, states, second] + ([] if frozen else [weight])
    for objective in OBJECTIVES:
        eager = distill(hidden, weight, *rest, objective, Added(states, second))
        fused = fused_distill(hidden, weight, *rest, objective, 5, Added(states, second))
        for name in ("loss_sum", "losses", "draft_token", "overlap"):
            torch.testing.assert_close(getattr(fused, name), getattr(eager, name), atol=1e-5, rtol=1e-5, msg=name)
        for found, expected in zip(gradients(fused, *leaves), gradients(eager, *leaves), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = distill(hidden, weight, *rest, OBJECTIVES[0])
    assert not torch.allclose(other.losses, distill(hidden, weight, *rest, OBJECTIVES[0], Added(states, second)).losses)


def test_fused_is_eager_where_blocks_have_their_real_size() -> None:
    for objective in OBJECTIVES:
        assert_same(random_case(40, 3, vocab=8192), objective, 64, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_bfloat16_hidden_with_float32_weight(objective: Objective) -> None:
    hidden, weight, teachers, rows, weights = random_case(64, 4, torch.bfloat16)
    fused = fused_distill(hidden, weight, teachers, rows, weights, objective)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact = distill(exact_hidden, weight, teachers, rows, weights, objective)
    torch.testing.assert_close(fused.losses, exact.losses, atol=0.05, rtol=0.02)
    found, expected = gradients(fused, hidden, weight), gradients(exact, exact_hidden, weight)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.05


def test_autocast_chooses_the_dtype_of_the_products() -> None:
    case = random_case(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_distill(*case, Kl())
    low = case[0].detach().bfloat16().requires_grad_()
    expected = fused_distill(low, *case[1:], Kl())
    assert found.losses.tolist() == expected.losses.tolist()
    grads, wanted = gradients(found, case[0], case[1]), gradients(expected, low, case[1])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    assert grads[0].tolist() == wanted[0].float().tolist() and grads[1].tolist() == wanted[1].tolist()


def test_every_teacher_row_is_made_once_and_never_all_at_once() -> None:
    hidden, weight, teachers, _, _ = random_case(12, 3)
    rows = torch.arange(12).repeat(3)  # three steps over the same rows
    asked: list[range] = []

    def counted(some: slice) -> Teacher:
        asked.append(range(some.start, some.stop))
        return teachers(some)

    fused_distill(hidden, weight, counted, rows, torch.ones(36), Kl(), chunk=9)
    assert asked == [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]
    asked.clear()
    fused_distill(hidden, weight, counted, rows, torch.ones(36), Kl(), chunk=10)  # a row's users in two chunks
    assert asked == [range(0, 4), range(3, 7), range(6, 10), range(10, 12)]


def test_one_row_and_a_tiny_vocabulary() -> None:
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = teacher(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([2.0]))
    case = (hidden, weight, partial(rows_of, target), torch.tensor([0]), torch.ones(1))
    assert_same(case, LkHybrid(), 512, atol=1e-6, rtol=1e-5)


def test_no_rows() -> None:
    hidden, weight, teachers, _, _ = random_case(2, 1)
    nothing = torch.zeros(0, dtype=torch.int64)
    for objective in OBJECTIVES:
        result = fused_distill(hidden[:0], weight, teachers, nothing, torch.zeros(0), objective)
        assert float(result.loss_sum.detach()) == 0 and len(result.losses) == len(result.draft_token) == 0
        (grad,) = torch.autograd.grad(result.loss_sum, weight)
        assert grad.tolist() == torch.zeros_like(weight).tolist()


def products_of(run: Callable[[], object]) -> int:
    """Matrix products that `run` computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")


def test_nothing_is_computed_for_gradients_that_nobody_asks_for() -> None:
    hidden, weight, teachers, rows, weights = random_case(2, 2)

    def run(states: Tensor, matrix: Tensor) -> Distilled:
        return fused_distill(states, matrix, teachers, rows, weights, LkHybrid())

    assert products_of(lambda: run(hidden, weight)) == 3
    assert products_of(lambda: run(hidden, weight.detach())) == 2  # a frozen lm_head
    assert products_of(lambda: run(hidden.detach(), weight)) == 2
    with torch.no_grad():  # validation
        assert products_of(lambda: run(hidden, weight)) == 1
    frozen = run(hidden, weight.detach())
    assert gradients(frozen, hidden)[0].tolist() == gradients(run(hidden, weight), hidden)[0].tolist()


def test_a_gradient_is_handed_out_once() -> None:
    result = fused_distill(*random_case(2, 2), Kl())
    result.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed out"):
        result.loss_sum.backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_what_is_not_finite_stays_visible(objective: Objective, bad: float) -> None:
    hidden, weight, teachers, rows, weights = random_case(4, 3)
    broken = hidden.detach().clone()
    broken[5, 2] = bad
    result = fused_distill(broken.requires_grad_(), weight, teachers, rows, weights, objective)
    assert torch.isfinite(result.losses).logical_not().nonzero().flatten().tolist() == [5]
    assert not bool(torch.isfinite(result.loss_sum))
    grads = gradients(result, broken, weight)
    assert [bool(torch.isfinite(grad).all()) for grad in grads] == [False, False]
    assert bool(torch.isfinite(grads[0][:5]).all()) and bool(torch.isfinite(grads[0][6:]).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_broken_teacher_stays_visible(objective: Objective, bad: float) -> None:
    hidden, weight, _, rows, weights = random_case(4, 3)
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    logits[2, 3] = bad
    lse = torch.full((4,), 5.0)

    def teachers(some: slice) -> Teacher:
        return teacher(logits[some], lse[some])

    result = fused_distill(hidden, weight, teachers, rows, weights, objective)
    assert torch.isfinite(result.losses).logical_not().tolist() == (rows == 2).tolist()
