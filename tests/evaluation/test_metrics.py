"""Every figure against one worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.evaluation.metrics import (
    Record,
    acceptance_rate,
    accepted_length,
    bootstrap,
    by_context,
    histogram,
    intervals,
    length_bucket,
    repetition,
    survival,
    tokens_per_second,
)


def record(lengths: Sequence[int], seconds: float = 1.0, prompt: str = "p") -> Record:
    return Record(prompt, "chat", list(lengths), list(range(sum(lengths) + 1)), seconds, 0.25, 0.5)


def test_accepted_length_is_tokens_over_passes() -> None:
    # (1 + 3 + 2) + 4 tokens in 3 + 1 passes; the mean of the means would be 3
    assert accepted_length([record([1, 3, 2]), record([4])]) == 2.5


def test_no_pass_gives_zero() -> None:
    assert accepted_length([record([])]) == 0.0
    assert tokens_per_second([record([], 0.0)]) == 0.0
    assert survival([record([])], 2) == [0.0, 0.0]


def test_tokens_per_second_sums_before_it_divides() -> None:
    # 6 tokens in 2 s and 4 in 0.5 s: 10 / 2.5, not the mean of 3 and 8
    assert tokens_per_second([record([1, 3, 2], 2.0), record([4], 0.5)]) == 4.0


def test_survival_by_hand() -> None:
    # passes of length 1, 3, 2, 2, 4: position 1 accepted by those above 1, position 2 above 2, position 3 above 3
    assert survival([record([1, 3, 2]), record([2, 4])], 3) == [4 / 5, 2 / 5, 1 / 5]


def test_acceptance_rate_by_hand() -> None:
    assert acceptance_rate([0.8, 0.4, 0.1]) == [0.8, 0.5, 0.25]
    assert acceptance_rate([0.5, 0.0, 0.0]) == [0.5, 0.0, None]  # nothing reached position 3
    assert acceptance_rate([]) == []  # plain decoding drafts nothing


@given(st.lists(st.integers(1, 5), min_size=1))
def test_survival_sums_to_the_accepted_drafts(lengths: list[int]) -> None:
    """Mean accepted length = 1 (the bonus token) + the sum of the survival figures."""
    records = [record(lengths)]
    assert accepted_length(records) == pytest.approx(1 + sum(survival(records, 4)))


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1, 2, 3]) == 0.0  # no 4-gram
    assert repetition([7] * 8) == pytest.approx(4 / 5)  # 5 4-grams, 1 of them new
    assert repetition([1, 2, 1, 2, 1], n=2) == pytest.approx(2 / 4)  # 12 21 | 12 21


def test_bootstrap_of_constant_data_is_a_point() -> None:
    assert bootstrap(lambda drawn: 2.5, 7) == (2.5, 2.5)
    records = [record([2, 2]) for _ in range(5)]
    assert bootstrap(lambda drawn: accepted_length([records[i] for i in drawn]), 5) == (2.0, 2.0)


def test_bootstrap_holds_the_mean_and_repeats() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 10.0]

    def mean(drawn: Sequence[int]) -> float:
        return sum(values[i] for i in drawn) / len(drawn)

    low, high = bootstrap(mean, len(values), seed=3)
    assert 1.0 <= low < 4.0 < high <= 10.0
    assert bootstrap(mean, len(values), seed=3) == (low, high)
    assert bootstrap(lambda drawn: float(len(drawn)), 5) == (5.0, 5.0)


def test_all_resamples_at_once_give_the_bootstraps_interval() -> None:
    """Of 40 prompts: both are percentiles of the same distribution, drawn by different generators."""
    rng = np.random.default_rng(5)
    sums = np.stack([rng.integers(5, 30, 40), rng.integers(5, 10, 40)], 1).astype(float)
    slow = bootstrap(lambda drawn: float(sums[drawn, 0].sum() / sums[drawn, 1].sum()), 40, rounds=4000)
    fast = intervals(sums, lambda total: total[:, 0] / total[:, 1], rounds=4000)
    assert fast == pytest.approx(slow, rel=0.02)
    assert intervals(sums[:1], lambda total: total[:, 0] / total[:, 1]) == (sums[0, 0] / sums[0, 1],) * 2
    assert fast == intervals(sums, lambda total: total[:, 0] / total[:, 1], rounds=4000), "it repeats"


def test_histogram_by_hand() -> None:
    assert histogram([record([1, 3, 1]), record([3])]) == [2, 0, 2]
    assert histogram([record([])]) == []


def test_context_by_hand() -> None:
    """A prompt of 61 tokens: passes begin at 62, 63 and 65 tokens; one of 127: at 128."""
    first, second = replace(record([1, 2, 3]), prompt_tokens=61), replace(record([4]), prompt_tokens=127)
    found = [(b.low, b.high, b.passes, b.accepted_length) for b in by_context([first, second])]
    assert found == [(0, 64, 2, 1.5), (64, 128, 1, 3.0), (128, 256, 1, 4.0)]


@given(st.integers(0, 100_000))
def test_every_context_is_in_one_bin(tokens: int) -> None:
    [found] = by_context([replace(record([1]), prompt_tokens=tokens)])
    assert found.low <= tokens + 1 < found.high


def test_length_buckets() -> None:
    names = [length_bucket(tokens) for tokens in (1, 128, 511, 512, 8191, 8192)]
    assert names == [
        "under 128 tokens", "128 to 511 tokens", "128 to 511 tokens", "512 to 2047 tokens", "2048 to 8191 tokens",
        "8192 tokens and more",
    ]  # fmt: skip
