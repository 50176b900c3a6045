"""Every objective by hand over three tokens, and what holds for all distributions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import OBJECTIVES, rows_of, teacher_of
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sstf.losses import CrossEntropy, Kl, LkAlpha, LkHybrid, Objective, Teacher, TotalVariation, distill, fused_distill

LOSSES = [pytest.param(distill, id="eager"), pytest.param(fused_distill, id="fused")]

# The target gives 1/2, 1/4, 1/20 to the three tokens that can be drafted and 1/5 to others; the draft 1/5, 1/2, 3/10.
# Renormalised: 5/8, 5/16, 1/16. The draft is under the target at the first token only: alpha = .2 + .25 + .05 = .5.
TARGET, DRAFT = [0.5, 0.25, 0.05], [0.2, 0.5, 0.3]
KL = 5 / 8 * math.log(5 / 8 / 0.2) + 5 / 16 * math.log(5 / 16 / 0.5) + 1 / 16 * math.log(1 / 16 / 0.3)
KL_SLOPE = [0.2 - 5 / 8, 0.5 - 5 / 16, 0.3 - 1 / 16]
# d alpha / d z_j = q_j (1[q_j < p_j] - .2), .2 being the draft's mass where it is under the target.
TV_SLOPE = [0.2 * (0.2 - 1), 0.5 * 0.2, 0.3 * 0.2]
SHARE = math.exp(-3 * 0.5)

BY_HAND = [
    (Kl(), KL, KL_SLOPE),
    (CrossEntropy(), math.log(5), [0.2 - 1, 0.5, 0.3]),
    (TotalVariation(), 0.5, TV_SLOPE),
    (LkAlpha(), math.log(2), [2 * slope for slope in TV_SLOPE]),
    (
        LkHybrid(),
        SHARE * KL + (1 - SHARE) * 0.5,
        [SHARE * kl + (1 - SHARE) * tv for kl, tv in zip(KL_SLOPE, TV_SLOPE, strict=True)],
    ),
]


def on_logits(loss: object, logits: Tensor, target: Teacher, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, overlaps and the gradient of the summed losses with respect to `logits` [row, vocab].

    The logits are the hidden states, and the weight is the identity.
    """
    count, vocab = logits.shape
    hidden = logits.clone().requires_grad_()
    result = loss(  # type: ignore[operator]
        hidden,
        torch.eye(vocab, dtype=logits.dtype),
        partial(rows_of, target),
        torch.arange(count),
        torch.ones(count),
        objective,
    )
    return result.losses, result.overlap, torch.autograd.grad(result.loss_sum, hidden)[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("objective", "value", "slope"), BY_HAND, ids=[repr(one[0]) for one in BY_HAND])
def test_three_tokens_by_hand(loss: object, objective: Objective, value: float, slope: list[float]) -> None:
    target = teacher_of(torch.tensor([TARGET], dtype=torch.float64))
    logits = torch.tensor([DRAFT], dtype=torch.float64).log() + 7  # a constant changes nothing
    losses, overlap, grad = on_logits(loss, logits, target, objective)
    torch.testing.assert_close(losses, torch.tensor([value], dtype=torch.float64))
    torch.testing.assert_close(overlap, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(grad, torch.tensor([slope], dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_draft_loses_nothing(loss: object) -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    for objective in (Kl(), TotalVariation(), LkAlpha(), LkHybrid()):
        losses, overlap, grad = on_logits(loss, probs.log(), teacher_of(probs), objective)
        assert float(losses) == pytest.approx(0, abs=1e-12) and float(overlap) == pytest.approx(1)
        # Where both are the same in floating point too, the slope of a minimum is any of two; it must not be noise.
        assert float(grad.abs().max()) < 0.2


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(5)
    target = teacher_of(0.9 * torch.softmax(2 * torch.randn(6, 7, generator=generator, dtype=torch.float64), -1))
    logits = 2 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    *_, grad = on_logits(fused_distill, logits, target, objective)
    # Lambda is a constant to the gradient: frozen at its value here.
    share = torch.exp(-torch.tensor(getattr(objective, "eta", 0.0)) * on_logits(distill, logits, target, Kl())[1])

    def value(at: Tensor) -> Tensor:
        if isinstance(objective, LkHybrid):
            kl, overlap, _ = on_logits(distill, at, target, Kl())
            return share * kl + (1 - share) * (1 - overlap)
        return on_logits(distill, at, target, objective)[0]

    for column in range(7):
        step = torch.zeros(6, 7, dtype=torch.float64)
        step[:, column] = 1e-6
        slope = (value(logits + step) - value(logits - step)) / 2e-6
        torch.testing.assert_close(grad[:, column], slope, atol=1e-8, rtol=1e-6)


def test_eager_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(6)
    target = teacher_of(0.8 * torch.softmax(torch.randn(3, 5, generator=generator, dtype=torch.float64), -1))
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    rows, weights = torch.tensor([2, 0, 1, 0]), torch.rand(4, generator=generator, dtype=torch.float64)
    for objective in (Kl(), CrossEntropy(), TotalVariation(), LkAlpha()):  # the hybrid's lambda is detached
        assert torch.autograd.gradcheck(
            lambda h, w, objective=objective: (
                distill(h, w, partial(rows_of, target), rows, weights, objective).loss_sum
            ),
            (hidden, weight),
        )


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 30), coverage=st.floats(1e-3, 1))
def test_bounds_hold_for_all_distributions(seed: int, scale: float, coverage: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, target = scale * torch.randn(2, 3, 9, generator=generator)
    given_teacher = teacher_of(coverage * torch.softmax(target, -1))
    for objective in OBJECTIVES:
        losses, overlap, grad = on_logits(fused_distill, logits, given_teacher, objective)
        assert bool((losses >= -1e-5).all()), objective
        assert bool(torch.isfinite(grad).all()), objective
        # Moving all logits together changes nothing; -log alpha has a slope of 1 / alpha, and rounds with it.
        assert float((grad.sum(-1) / (1 + 1 / overlap)).abs().max()) < 2e-6, objective
        assert bool((overlap >= 0).all()) and bool((overlap <= given_teacher.coverage + 1e-6).all())


def test_the_hybrid_leans_from_one_end_to_the_other() -> None:
    target = teacher_of(torch.tensor([TARGET], dtype=torch.float64))
    logits = torch.tensor([DRAFT], dtype=torch.float64).log()
    kl, tv = (on_logits(fused_distill, logits, target, one) for one in (Kl(), TotalVariation()))
    for eta, expected in ((0.0, kl), (1e3, tv)):
        found = on_logits(fused_distill, logits, target, LkHybrid(eta=eta))
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[2], expected[2])


def test_a_configuration_names_its_objective() -> None:
    adapter: TypeAdapter[Objective] = TypeAdapter(Objective)
    assert adapter.validate_python({"kind": "lk_hybrid", "eta": 2.0}) == LkHybrid(eta=2.0)
    assert [adapter.validate_python({"kind": one.kind}).kind for one in OBJECTIVES[:5]] == [
        "kl", "ce", "tv", "lk_alpha", "lk_hybrid"
    ]  # fmt: skip
    for wrong in ({"kind": "js"}, {"kind": "kl", "eta": 3.0}, {"kind": "lk_hybrid", "eta": -1.0}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
