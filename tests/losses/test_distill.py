from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from sstf.losses import Distilled, Teacher, accepted_drafts, distill, fused_distill, teacher

distill_module = sys.modules[distill.__module__]  # the package gives its name to the function


def random_case(
    rows: int, repeats: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Teacher, Tensor, Tensor]:
    """`rows` teacher rows, each asked for about `repeats` times in a shuffled order, as the steps of TTT do."""
    generator = torch.Generator().manual_seed(rows)
    count, width, vocab = rows * repeats, 5, 11
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).float().requires_grad_()
    logits = torch.randn(rows, vocab, generator=generator) * 2
    target = teacher(logits, logits.logsumexp(-1) + 0.3)
    chosen = torch.randint(rows, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    return hidden, weight, target, chosen, weights


def gradients(result: Distilled, *leaves: Tensor) -> list[Tensor]:
    # Times 3: what stands behind the loss in the graph must reach the leaves.
    return list(torch.autograd.grad(3 * result.loss_sum, leaves))


def test_teacher_by_hand() -> None:
    # Over the whole vocabulary of four: 1/2, 1/4, 1/8, 1/8. The draft vocabulary holds the first two.
    full = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 7
    found = teacher(full[:, :2], full.logsumexp(-1))
    torch.testing.assert_close(found.probs, torch.tensor([[2 / 3, 1 / 3]]))
    torch.testing.assert_close(found.coverage, torch.tensor([0.75]))
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(found.entropy, torch.tensor([entropy]))


def test_coverage_is_never_above_one() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert float(teacher(logits, logits.logsumexp(-1) - 1e-3).coverage.max()) == 1.0


@pytest.mark.parametrize("loss", [distill, fused_distill])
def test_two_tokens_by_hand(loss: object) -> None:
    # Draft logits (log 3, 0): draft_probs 3/4, 1/4. Target 1/2, 1/2 with half of its mass in the draft vocabulary.
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    target = teacher(torch.zeros(1, 2), torch.tensor([math.log(4)]))
    result = loss(hidden, weight, target, torch.tensor([0]), torch.tensor([0.8]))  # type: ignore[operator]
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(result.losses, torch.tensor([divergence]))
    torch.testing.assert_close(result.loss_sum, torch.tensor(0.8 * divergence))
    # min(1/4, 3/4) + min(1/4, 1/4)
    torch.testing.assert_close(result.overlap, torch.tensor([0.5]))
    assert result.draft_token.tolist() == [0]
    # d loss / d logits = 0.8 * (draft_probs - target_probs) = (0.2, -0.2)
    grad_hidden, grad_weight = torch.autograd.grad(result.loss_sum, (hidden, weight))
    torch.testing.assert_close(grad_hidden, torch.tensor([[0.2 * math.log(3)]]))
    torch.testing.assert_close(grad_weight, torch.tensor([[0.2], [-0.2]]))


@pytest.mark.parametrize("chunk", [1, 6, 7, 12, 512])
def test_fused_is_eager(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_module, "CHUNK", chunk)
    hidden, weight, target, rows, weights = random_case(4, 3)
    eager, fused = (loss(hidden, weight, target, rows, weights) for loss in (distill, fused_distill))
    for name in ("loss_sum", "losses", "draft_token", "overlap"):
        torch.testing.assert_close(getattr(fused, name), getattr(eager, name), msg=name)
    for found, expected in zip(gradients(fused, hidden, weight), gradients(eager, hidden, weight), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


def test_fused_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, target, rows, weights = random_case(2, 2)
    double = Teacher(target.probs.double(), target.coverage.double(), target.entropy.double())
    double = Teacher(double.probs / double.probs.sum(-1, keepdim=True), double.coverage, double.entropy)
    (grad,) = torch.autograd.grad(fused_distill(hidden, weight, target, rows, weights).loss_sum, hidden)
    step = 1e-3
    for index in [(0, 0), (3, 4)]:
        moved = hidden.detach().clone()
        moved[index] += step
        up = float(distill(moved, weight.detach(), target, rows, weights).loss_sum)
        moved[index] -= 2 * step
        down = float(distill(moved, weight.detach(), target, rows, weights).loss_sum)
        assert float(grad[index]) == pytest.approx((up - down) / (2 * step), abs=2e-3)


def test_fused_bfloat16_hidden_with_float32_weight() -> None:
    hidden, weight, target, rows, weights = random_case(16, 4, torch.bfloat16)
    fused = fused_distill(hidden, weight, target, rows, weights)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact = distill(exact_hidden, weight, target, rows, weights)
    torch.testing.assert_close(fused.losses, exact.losses, atol=0.05, rtol=0.02)
    found, expected = gradients(fused, hidden, weight), gradients(exact, exact_hidden, weight)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.02


def test_no_rows() -> None:
    hidden, weight, target, _, _ = random_case(2, 1)
    nothing = torch.zeros(0, dtype=torch.int64)
    for loss in (distill, fused_distill):
        result = loss(hidden[:0], weight, target, nothing, torch.zeros(0))
        assert result.loss_sum.tolist() == 0 and len(result.losses) == 0
        (grad,) = torch.autograd.grad(result.loss_sum, weight)
        assert grad.tolist() == torch.zeros_like(weight).tolist()


def test_nothing_is_computed_for_gradients_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target, rows, weights = random_case(2, 2)
    made: list[tuple[int, ...]] = []
    zeros_like = torch.zeros_like

    def counted(like: Tensor, **kwargs: object) -> Tensor:
        made.append(tuple(like.shape))
        return zeros_like(like, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros_like", counted)
    with torch.no_grad():
        fused_distill(hidden, weight, target, rows, weights)
    assert made == []  # the weight's gradient is the one large tensor of validation
    fused_distill(hidden, weight, target, rows, weights)
    assert made == [tuple(weight.shape)]


def test_accepted_drafts_stop_at_the_first_miss() -> None:
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert accepted_drafts(hits).tolist() == [3, 1, 0, 2]
    assert accepted_drafts(hits[:, :0]).tolist() == []
