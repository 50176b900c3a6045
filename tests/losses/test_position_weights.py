from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sstf.losses import DPace, Exponential


def test_exponential() -> None:
    found = Exponential(gamma=2.0).weights(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool))
    assert [[round(w, 6) for w in row] for row in found.tolist()] == [
        [round(math.exp(-i / 2), 6)] * 2 for i in range(3)
    ]


def test_d_pace_by_hand() -> None:
    """Floor 0.5 and chances 1, 0, 0.6: s = 1, 0.5, 0.8; C = 1, 0.5, 0.4; w = 1.9, 0.9, 0.4."""
    chances = torch.tensor([[1.0], [0.0], [0.6]])
    torch.testing.assert_close(
        DPace(floor=0.5).weights(chances, torch.ones(3, 1, dtype=torch.bool)), torch.tensor([[1.9], [0.9], [0.4]])
    )
    # Without a label in the middle: s = 1, -, 0.8; C = 1, -, 0.8.
    some = torch.tensor([[True], [False], [True]])
    assert [round(float(w), 6) for w in DPace(floor=0.5).weights(chances, some)[some]] == [1.8, 0.8]


@given(st.integers(0, 999), st.floats(0, 1))
def test_d_pace_is_the_slope_of_the_expected_accepted_length(seed: int, floor: float) -> None:
    """sum_m C_m has w_k / s_k as its derivative by s_k: what the chain gains by a likelier token."""
    chances = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    steps = ((1 - floor) * chances + floor).requires_grad_()
    (slope,) = torch.autograd.grad(steps.cumprod(0).sum(), steps)
    found = DPace(floor=floor).weights(chances, torch.ones(5, 1, dtype=torch.bool))
    torch.testing.assert_close(found, slope * steps.detach())
    assert not found.requires_grad
