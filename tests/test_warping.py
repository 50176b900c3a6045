from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sstf.warping import warp, warp_top

LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0,), [0.15, 0.5, 0.1, 0.25]),
        # squares, over their sum of 0.345
        ((0.5,), [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),
        # 0.5 is short of 0.7, so the token that crosses it stays
        ((1.0, 0.7), [0, 2 / 3, 0, 1 / 3]),
        ((1.0, 0.8), [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        ((1.0, 1e-12), [0, 1, 0, 0]),
        ((1.0, 1.0, 2), [0, 2 / 3, 0, 1 / 3]),
        # top_k comes first: the best of the two has 2/3, enough on its own; top_p first would keep both
        ((1.0, 0.6, 2), [0, 1, 0, 0]),
        ((1.0, 1.0, 99), [0.15, 0.5, 0.1, 0.25]),
        ((0.0,), [0, 1, 0, 0]),
        ((0.0, 0.3, 1), [0, 1, 0, 0]),
    ],
)
def test_by_hand(settings: tuple[float, float, int], expected: list[float]) -> None:
    probs = warp(LOGITS, *settings)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_greedy_takes_the_first_of_equals() -> None:
    assert warp(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]]), 0.0).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_vanishing_temperature_is_greedy(temperature: float, top_p: float) -> None:
    assert warp(torch.tensor([-3.0, 40.0, 39.0]), temperature, top_p).tolist() == [0, 1, 0]


def test_top_p_of_one_is_off_whatever_rounding_says() -> None:
    # The float32 cumulative sum reaches 1 long before the last token, whose probability is e^-20 or so.
    logits = torch.linspace(0, -20, 1000)
    assert bool((warp(logits, 1.0, 1.0, 1000) > 0).all())
    torch.testing.assert_close(warp(logits, 1.0, 1.0, 1000), warp(logits, 1.0))


def test_bfloat16_logits_give_float32_probabilities() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(warp(logits, 0.7, 0.9), warp(logits.float(), 0.7, 0.9))
    assert warp(logits, 0.0).dtype == torch.float32


def test_one_value_a_row() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    temperature, top_p = torch.tensor([[0.5], [1.0], [2.0]]), torch.tensor([[0.3], [1.0], [0.8]])
    probs, ids = warp_top(logits, temperature, top_p, 10)
    for row in range(3):
        alone = warp(logits[row], float(temperature[row]), float(top_p[row]), 10)
        torch.testing.assert_close(torch.zeros(20).scatter(0, ids[row], probs[row]), alone)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_p=st.floats(0.05, 0.999),
    top_k=st.integers(0, 40),
    vocab=st.integers(1, 30),
)
def test_as_transformers(seed: int, temperature: float, top_p: float, top_k: int, vocab: int) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(min(top_k, vocab))(None, expected)
    ahead = expected.softmax(-1).sort(descending=True).values.cumsum(-1)
    if bool(((ahead - top_p).abs() < 1e-5).any()):
        return  # which side of the threshold a token falls on is a matter of rounding
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)
    torch.testing.assert_close(warp(logits, temperature, top_p, top_k), expected, atol=1e-6, rtol=1e-5)
