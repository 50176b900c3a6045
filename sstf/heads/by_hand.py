"""The pieces of a Llama layer with their gradients written out, for a backward pass that keeps only their inputs.

Arithmetic is in float32 and is rounded once, to the dtype of the input; a gradient of a weight is float32.
Each is checked against autograd in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms(x: Float[Tensor, "*rows hidden"], weight: Float[Tensor, "hidden"], eps: float) -> Float[Tensor, "*rows hidden"]:
    """x / sqrt(mean of x^2 + eps) * weight, in the dtype of `x`."""
    return (x * inverse_rms(x, eps)).mul_(weight).to(x.dtype)


class Rms(torch.autograd.Function):
    """`rms` with its gradient; of the pass forward only the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `rms`."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """See `rms_backward`."""
        x, weight = ctx.saved_tensors
        inverse = inverse_rms(x, ctx.eps)
        rows = -1, x.shape[-1]
        of_x, of_weight = rms_backward(grad.reshape(rows), (x * inverse).reshape(rows), inverse.reshape(-1, 1), weight)
        return of_x.view(x.shape), of_weight, None


def inverse_rms(x: Float[Tensor, "*rows hidden"], eps: float) -> Float[Tensor, "*rows 1"]:
    """1 / sqrt(mean of x^2 + eps), float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_backward(
    grad: Float[Tensor, "row hidden"],
    unit: Float[Tensor, "row hidden"],
    inverse: Float[Tensor, "row 1"],
    weight: Float[Tensor, "hidden"],
) -> tuple[Float[Tensor, "row hidden"], Float[Tensor, "hidden"]]:
    """Gradients of `rms`'s input, in float32, and of its weight.

    With u = x / rms(x) and g = grad * weight the first is (g - u * mean(g * u)) / rms(x).

    Args:
        grad: of what `rms` returned.
        unit: x / rms(x), float32.
        inverse: 1 / rms(x), see `inverse_rms`.
        weight: of the norm.
    """
    product = grad * unit
    of_weight = product.sum(0)
    mean = (product @ weight.float())[:, None].div_(unit.shape[-1])
    return (grad * weight.float()).addcmul_(unit, mean, value=-1).mul_(inverse), of_weight


def rotate_(
    x: Float[Tensor, "row heads dim"], cos: Float[Tensor, "row 1 half"], sin: Float[Tensor, "row 1 half"]
) -> None:
    """Turn `x` in place by rotary positions, in Llama's half-split layout. With `-sin` it is turned back, which is
    also the gradient."""
    low, high = x.float().chunk(2, -1)
    turned_low = (low * cos).addcmul_(high, sin, value=-1)
    turned_high = (high * cos).addcmul_(low, sin)
    half = cos.shape[-1]
    x[..., :half], x[..., half:] = turned_low, turned_high


def gated(gate_up: Float[Tensor, "row two_wide"]) -> Float[Tensor, "row wide"]:
    """silu(gate) * up, of both side by side."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gated_backward_(grad: Float[Tensor, "row wide"], gate_up: Float[Tensor, "row two_wide"]) -> Tensor:
    """Put the gradients of gate and up in their place; returns what `gated` returned. `grad` is used up."""
    gate, up = gate_up.chunk(2, -1)
    opened = F.silu(gate)
    out = opened * up
    opened.mul_(grad)  # the gradient of up
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=gate)
    up.copy_(opened)
    return out
