"""Against autograd, in float32 to rounding; and that low precision is rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sstf.heads.by_hand import Rms, gated, gated_backward_, inverse_rms, rms, rms_backward, rotate_

EPS = 1e-5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_rms() -> None:
    # mean of squares of (3, 4) is 12.5
    found = rms(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    x, weight = drawn(7, 12).requires_grad_(), drawn(12).requires_grad_()
    expected = F.rms_norm(x, (12,), weight, EPS)
    torch.testing.assert_close(rms(x, weight, EPS), expected)
    grad = drawn(7, 12)
    inverse = inverse_rms(x, EPS)
    found = rms_backward(grad, x * inverse, inverse, weight)
    for one, other in zip(found, torch.autograd.grad(expected, [x, weight], grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    by_function = torch.autograd.grad(Rms.apply(x.view(7, 1, 12), weight, EPS), [x, weight], grad.view(7, 1, 12))
    for one, other in zip(by_function, found, strict=True):
        assert torch.equal(one, other)


def test_gate() -> None:
    both = drawn(7, 24).requires_grad_()
    gate, up = both.chunk(2, -1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(gated(both), expected)
    grad = drawn(7, 12)
    (of_both,) = torch.autograd.grad(expected, [both], grad)
    place = both.detach().clone()
    torch.testing.assert_close(gated_backward_(grad.clone(), place), expected)
    torch.testing.assert_close(place, of_both, atol=1e-6, rtol=1e-5)


def test_rotation_is_undone_by_the_opposite_one() -> None:
    angles = drawn(5, 1, 3) * 10
    x = drawn(5, 2, 6)
    turned = x.clone()
    rotate_(turned, angles.cos(), angles.sin())
    # Dimensions j and j + 3 turn together, as a complex number does.
    as_complex = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], -1), atol=1e-6, rtol=1e-5)
    rotate_(turned, angles.cos(), -angles.sin())
    torch.testing.assert_close(turned, x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("part", ["norm", "rotation"])
def test_low_precision_is_rounded_once(part: str) -> None:
    x, weight = drawn(9, 2, 12).bfloat16(), drawn(12)
    if part == "norm":
        found, exact = rms(x[:, 0], weight, EPS), rms(x[:, 0].float(), weight, EPS)
    else:
        angles = drawn(9, 1, 6) * 10
        found, exact = x.clone(), x.float()
        for place in (found, exact):
            rotate_(place, angles.cos(), angles.sin())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
