"""Steps, shares and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.errors import ConfigError
from sstf.train.config import TrainConfig
from sstf.train.plan import check_processes, micro_batches, plan_steps, shares

ROWS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(ROWS, st.integers(16, 600), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_takes_every_conversation_once(rows: list[int], tokens: int, epochs: int, seed: int) -> None:
    steps = plan_steps(rows, TrainConfig(epochs=epochs, step_tokens=tokens), seed)
    taken = [i for step in steps for i in step]
    assert sorted(taken) == sorted(list(range(len(rows))) * epochs)
    assert sorted(taken[: len(rows)]) == list(range(len(rows)))
    assert all(len(step) == 1 or sum(rows[i] for i in step) <= tokens for step in steps)


@given(ROWS, st.integers(16, 600), st.integers(1, 20), st.integers(1, 20))
def test_a_longer_run_begins_like_a_shorter_one(rows: list[int], tokens: int, one: int, two: int) -> None:
    short, long = sorted((one, two))
    plans = [plan_steps(rows, TrainConfig(steps=n, step_tokens=tokens), 3) for n in (short, long)]
    assert [len(plan) for plan in plans] == [short, long]
    assert plans[1][:short] == plans[0]


@given(ROWS, st.integers(1, 5))
def test_shares_lose_nothing_and_are_even(rows: list[int], processes: int) -> None:
    step = list(range(len(rows)))
    dealt = shares(step, rows, processes)
    assert sorted(i for share in dealt for i in share) == step
    loads = [sum(rows[i] for i in share) for share in dealt]
    assert max(loads) - min(loads) <= max(rows)


@given(ROWS, st.integers(1, 500))
def test_micro_batches_fit(rows: list[int], tokens: int) -> None:
    share = list(range(len(rows)))
    pieces = micro_batches(share, rows, tokens)
    assert [i for piece in pieces for i in piece] == share
    assert all(piece and (len(piece) == 1 or sum(rows[i] for i in piece) <= tokens) for piece in pieces)


def test_processes_without_work_are_refused() -> None:
    check_processes([[0, 1], [2, 3], [4]], 2, 64)
    with pytest.raises(ConfigError, match=r"3 of 3 steps have fewer .* than the 3 processes.*raise train"):
        check_processes([[0, 1], [2, 3], [4]], 3, 64)
