"""Two rungs of the ladder beside each other: the first tensor that differs by more than rounding explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sstf.heads import Eagle3Head, PEagleHead
from sstf.parity.trace import Trace

# A stored weight went through bfloat16 at most once, which keeps eight significant bits. Anything else is a change.
ROUNDING = 2.0**-7
# Positions at which rotary angles are compared: what scales RoPE changes late ones most.
ANGLES = 64


# How far two rungs may lie apart. Somewhere between any two of them values are rounded to bfloat16: training reads
# features that were, engines get weights that are. The demo's head stays under 0.011 and above 0.98: docs/parity.md.
FURTHEST = 0.05  # of a value on the way to the logits, see `Comparison.error`
AGREEMENT = 0.9  # share of drafted tokens that must be the same


@dataclass(frozen=True)
class Difference:
    """A tensor of one rung that is not that of the rung before."""

    name: str
    maximum: float | None  # largest absolute difference; None where shapes differ, or one lacks it
    what: str  # in words

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def tensors_of(head: nn.Module, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """What is kept of a head of any method, its layers, and the mask token that P-EAGLE has among its settings."""
    tokens = {"mask_token": torch.tensor(head.mask_token)} if isinstance(head, PEagleHead) else {}
    return {"layers": torch.tensor(layers), **tokens, **head.state_dict()}


def weights_of(head: Eagle3Head, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """All that decides what an EAGLE-3 head computes, in the order of computation."""
    last = head.shape.max_position_embeddings - 1
    positions = torch.linspace(0, last, min(ANGLES, last + 1), dtype=torch.float64).long().to(head.d2t.device)
    cos, sin = head.rope(positions)
    own, shape = head.state_dict(), head.shape
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return {
        "layers": torch.tensor(layers),
        "rms_norm_eps": torch.tensor(shape.rms_norm_eps),
        **{flag: torch.tensor(vars(shape)[flag]) for flag in flags},
        "embeddings": head.embeddings,
        **{name: tensor for name, tensor in own.items() if not name.startswith(("norm.", "lm_head."))},
        "rope.cos": cos,
        "rope.sin": sin,
        **{name: tensor for name, tensor in own.items() if name.startswith(("norm.", "lm_head."))},
    }


def first_weight(before: dict[str, Tensor], after: dict[str, Tensor]) -> Difference | None:
    """The first weight that is another one after rounding."""
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after or name not in before:
            return Difference(name, None, "is missing" if name in before else "was not there before")
        a, b = before[name], after[name]
        if a.shape != b.shape:
            return Difference(name, None, f"has shape {tuple(b.shape)}, before {tuple(a.shape)}")
        if not a.is_floating_point():
            if not torch.equal(a, b.to(a.device)):
                values = f"is {b.tolist()}, before {a.tolist()}" if a.numel() <= 8 else _count(a, b)
                return Difference(name, float((a.long() - b.long()).abs().max()), values)
            continue
        apart = (a.float() - b.float()).abs()
        if bool((apart > ROUNDING * a.float().abs() + 1e-6).any()) or not bool(b.isfinite().all()):
            return Difference(name, float(apart.max()), f"differs by up to {float(apart.max()):.3g}")
    return None


def _count(a: Tensor, b: Tensor) -> str:
    return f"differs in {int((a != b).sum()):,} of {a.numel():,} entries"


@dataclass
class _Sums:
    """Of one tensor, over texts; the first two by channel (the last dimension)."""

    squared_errors: Tensor
    squares: Tensor
    errors: float
    count: int
    largest: float


class Comparison:
    """Traces of two rungs, text by text."""

    def __init__(self) -> None:
        self.sums: dict[str, _Sums] = {}
        self.other_shape: Difference | None = None
        self.same = self.drafted = 0

    def add(self, before: Trace, after: Trace) -> None:
        """One text of both."""
        for name, a in before.values.items():
            b = after.values[name]
            if a.shape != b.shape:
                what = f"has shape {tuple(b.shape)}, before {tuple(a.shape)}"
                self.other_shape = self.other_shape or Difference(name, None, what)
                continue
            a, apart = a.float(), (a.float() - b.float()).abs()
            one = _Sums(apart.square().sum(0), a.square().sum(0), float(apart.sum()), apart.numel(), float(apart.max()))
            sums = self.sums.get(name)
            self.sums[name] = one if sums is None else _added(sums, one)
        self.same += int((before.drafted == after.drafted).sum())
        self.drafted += before.drafted.numel()

    def error(self, name: str) -> float:
        """Of a tensor: root mean square of its error as a share of that of its values, for each channel, in the mean.
        (Over all channels together, the few in which targets keep huge values would hide the others.)"""
        sums = self.sums[name]
        tiny = torch.finfo(torch.float32).tiny
        return float((sums.squared_errors / sums.squares.clamp_min(tiny)).sqrt().mean())

    @property
    def agreement(self) -> float:
        """Share of drafted tokens that are the same."""
        return self.same / self.drafted

    @property
    def logits(self) -> dict[str, float]:
        """Largest and mean absolute error of the draft logits; nothing where they are not seen."""
        logits = [sums for name, sums in self.sums.items() if name.startswith("logits.")]
        if not logits:
            return {}
        mean = sum(sums.errors for sums in logits) / max(1, sum(sums.count for sums in logits))
        return {"logits_max": max(sums.largest for sums in logits), "logits_mean": mean}

    def first(self) -> Difference | None:
        """The first value, in the order of computation, that is further off than the bounds allow."""
        if self.other_shape:
            return self.other_shape
        for name, sums in self.sums.items():
            error = self.error(name)
            if not error <= FURTHEST:  # a NaN is a difference too
                return Difference(name, sums.largest, f"is off by {error:.1%} of its size (up to {sums.largest:.3g})")
        return None


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(
        one.squared_errors + other.squared_errors,
        one.squares + other.squares,
        one.errors + other.errors,
        one.count + other.count,
        max(one.largest, other.largest),
    )
