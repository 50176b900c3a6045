"""The reverse KL that is added to rows of an objective."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from loss_cases import OBJECTIVES, rows_of, teacher_of
from torch import Tensor

from sstf.losses import Added, Kl, Objective, Teacher, distill, fused_distill
from sstf.losses import fused as fused_module
from sstf.losses import teachers as teachers_module
from sstf.losses.objectives import FLOOR

BOTH = [pytest.param(distill, id="eager"), pytest.param(fused_distill, id="fused")]


def case(dtype: torch.dtype, vocab: int = 11) -> tuple[list[Tensor], Teacher, Tensor, Tensor, Tensor]:
    """Leaves (hidden, weight, states, second), teacher, its rows, weights and weights of the reverse KL."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((12, 5), (vocab, 5), (12, 3), (vocab, 3))
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    probs = 0.8 * torch.softmax(2 * torch.randn(4, vocab, generator=draw, dtype=torch.float64), -1).to(dtype)
    probs[1, 3:] = 0  # a teacher of the top 3
    weights, reverse = torch.rand(2, 12, generator=draw, dtype=torch.float64).to(dtype)
    return leaves, teacher_of(probs), torch.randint(4, (12,), generator=draw), weights, reverse * (reverse > 0.4)


@pytest.mark.parametrize("loss", BOTH)
def test_two_tokens_by_hand(loss: object) -> None:
    """q = (3/4, 1/4) and t = (1/2, 1/2), of which the draft vocabulary holds 0.8: R = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    logits = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log().requires_grad_()
    target = teacher_of(torch.tensor([[0.4, 0.4]], dtype=torch.float64))
    nothing, twice = torch.zeros(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    result = loss(logits, identity, partial(rows_of, target), torch.tensor([0]), nothing, Kl(), reverse=twice)  # type: ignore[operator]
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(result.loss_sum.detach()) == pytest.approx(2 * expected)
    (grad,) = torch.autograd.grad(result.loss_sum, logits)
    slope = 2 * 0.75 * (math.log(1.5) - expected)
    torch.testing.assert_close(grad, torch.tensor([[slope, -slope]], dtype=torch.float64))


@pytest.mark.parametrize("loss", BOTH)
def test_a_token_without_probability_costs_what_the_floor_says(loss: object) -> None:
    logits = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    target = teacher_of(torch.tensor([[0.9, 0.0]], dtype=torch.float64))
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    result = loss(logits, identity, partial(rows_of, target), torch.tensor([0]), nothing, Kl(), reverse=one)  # type: ignore[operator]
    assert float(result.loss_sum.detach()) == pytest.approx(math.log(0.5) - 0.5 * math.log(FLOOR))
    (grad,) = torch.autograd.grad(result.loss_sum, logits)
    assert float(grad[0, 1]) == pytest.approx(-0.25 * math.log(FLOOR))  # pushed down


def test_the_eager_form_passes_gradcheck() -> None:
    """The fused one hands its gradient out once, and is held against this one."""
    leaves, target, rows, weights, reverse = case(torch.float64)

    def value(hidden: Tensor, weight: Tensor, states: Tensor, second: Tensor) -> Tensor:
        added = Added(states, second)
        teachers = partial(rows_of, target)
        return distill(hidden, weight, teachers, rows, weights, Kl(), added, reverse).loss_sum

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("chunk", [1, 5, 12, 512])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_fused_is_eager(objective: Objective, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers_module, "CACHED", 4 * 11)  # blocks of four rows
    monkeypatch.setattr(fused_module, "TOKENS", 4)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        (hidden, weight, *_), target, rows, weights, reverse = case(dtype)
        given = (hidden, weight, partial(rows_of, target), rows, weights, objective)
        eager, fused = distill(*given, reverse=reverse), fused_distill(*given, chunk, reverse=reverse)
        torch.testing.assert_close(fused.losses, eager.losses, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(fused.loss_sum, eager.loss_sum, atol=tolerance, rtol=tolerance)
        for found, expected in zip(
            torch.autograd.grad(fused.loss_sum, (hidden, weight)),
            torch.autograd.grad(eager.loss_sum, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_weights_of_zero_add_nothing() -> None:
    (hidden, weight, *_), target, rows, weights, reverse = case(torch.float64)
    given = (hidden, weight, partial(rows_of, target), rows, weights, Kl())
    plain, zeros = fused_distill(*given), fused_distill(*given, reverse=torch.zeros_like(reverse))
    torch.testing.assert_close(zeros.loss_sum, plain.loss_sum)
    for one, other in zip(
        torch.autograd.grad(zeros.loss_sum, (hidden, weight)),
        torch.autograd.grad(plain.loss_sum, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
