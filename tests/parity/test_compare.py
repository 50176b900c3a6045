"""Figures of a comparison by hand, and which tensor is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sstf.parity.compare import FURTHEST, Comparison, first_weight
from sstf.parity.trace import Trace


def trace(value: Tensor, drafted: list[int] | None = None) -> Trace:
    return Trace({"logits.0": value}, torch.tensor([drafted or [0]]))


def test_errors_by_channel() -> None:
    comparison = Comparison()
    comparison.add(trace(torch.tensor([[3.0, 1000.0]])), trace(torch.tensor([[3.0, 1000.0]])))
    comparison.add(trace(torch.tensor([[4.0, 0.0]]), [1, 2]), trace(torch.tensor([[3.0, 0.0]]), [1, 3]))
    # Channel 0: values 3 and 4, errors 0 and 1: sqrt(1 / 25). Channel 1 has no error, however large its values.
    assert comparison.error("logits.0") == pytest.approx((0.2 + 0.0) / 2)
    assert comparison.logits == {"logits_max": 1.0, "logits_mean": pytest.approx(1 / 4)}
    assert comparison.agreement == pytest.approx(2 / 3)
    found = comparison.first()
    assert found is not None and found.name == "logits.0" and found.maximum == 1.0


def test_a_value_that_is_no_number_is_a_difference() -> None:
    comparison = Comparison()
    comparison.add(trace(torch.ones(1, 2)), trace(torch.tensor([[1.0, torch.nan]])))
    assert comparison.first() is not None


def test_an_error_in_small_channels_beside_a_huge_one() -> None:
    """As targets have them: a few channels hold values a hundred times those of all others."""
    before = torch.ones(5, 64)
    before[:, 0] = 1e4
    after = before.clone()
    after[:, 1:] *= 1.2
    comparison = Comparison()
    comparison.add(trace(before), trace(after))
    assert comparison.error("logits.0") > FURTHEST


def test_weights() -> None:
    before = {"layers": torch.tensor([1, 3]), "fc": torch.randn(4, 4), "norm": torch.ones(4)}
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in before.items()}
    assert first_weight(before, rounded) is None
    found = first_weight(before, before | {"norm": torch.full((4,), 1.5), "layers": torch.tensor([2, 3])})
    assert str(found) == "layers is [2, 3], before [1, 3]"
    found = first_weight(before, before | {"norm": torch.tensor([1, 1, 1, 1.5])})
    assert found is not None and (found.name, found.maximum) == ("norm", 0.5)
    assert str(first_weight(before, {"fc": before["fc"], "norm": before["norm"]})) == "layers is missing"
    assert str(first_weight(before, before | {"bias": torch.zeros(1)})) == "bias was not there before"
    assert str(first_weight(before, before | {"norm": torch.ones(5)})) == "norm has shape (5,), before (4,)"
    assert first_weight(before, before | {"norm": torch.full((4,), torch.nan)}) is not None
