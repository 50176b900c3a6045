"""Which conversations are held out, and in which order the others are trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from feature_samples import extract_to, random_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.features import FeatureStore, epoch_batches, split
from sstf.targets import Target
from sstf.types import TokenSample

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(16, 200), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_conversation_once_within_the_budget(lengths: list[int], budget: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, budget, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert batches == epoch_batches(lengths, budget, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    lengths = [5 + i % 7 for i in range(100)]
    orders = [epoch_batches(lengths, 64, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    """Pinned: a run that is resumed after an update must not meet conversations twice or never."""
    assert epoch_batches([5, 9, 3, 7, 4, 8], 16, seed=7, epoch=2) == [[5], [4, 0, 3], [1, 2]]


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, stop=st.integers(0, 300))
def test_a_resumed_run_meets_exactly_what_is_left(lengths: list[int], stop: int) -> None:
    """Killed after `stop` batches of three epochs, with nothing kept but that number."""
    whole = [batch for epoch in range(3) for batch in epoch_batches(lengths, 64, 1, epoch)]
    stop = min(stop, len(whole))
    seen = whole[:stop]
    again = [batch for epoch in range(3) for batch in epoch_batches(lengths, 64, 1, epoch)][stop:]
    assert sorted(i for batch in seen + again for i in batch) == sorted([*range(len(lengths))] * 3)


@pytest.mark.parametrize(("budget", "longest"), [(1024, 1022), (2048, 2046), (4096, 2046)])
def test_batches_are_full(budget: int, longest: int) -> None:
    """Lengths spread as ShareGPT's: half under 250 rows, a few percent cut at the longest."""
    spread = torch.empty(1000).log_normal_(5.5, 1.1, generator=torch.Generator().manual_seed(0))
    lengths = spread.clamp(1, longest).long().tolist()
    batches = epoch_batches(lengths, budget, 0, 0)
    assert sum(lengths) / (budget * len(batches)) > 0.97


def test_no_global_random_state_is_used() -> None:
    before = torch.get_rng_state()
    epoch_batches([5] * 40, 64, 0, 0)
    assert before.equal(torch.get_rng_state())


@pytest.fixture(scope="module")
def open_store(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FeatureStore]:
    def make(samples: list[TokenSample]) -> FeatureStore:
        folder: Path = tmp_path_factory.mktemp("store")
        return FeatureStore(extract_to(folder, tiny_target, samples))

    return make


def test_held_out_conversations_are_stable(open_store: Callable[..., FeatureStore]) -> None:
    store = open_store(random_samples(30))
    training, held_out = split(store, 5, seed=3)
    assert len(held_out) == 5
    assert sorted(training + held_out) == list(range(30))
    assert split(store, 5, seed=3) == (training, held_out)
    assert split(store, 5, seed=4)[1] != held_out
    # Asking for more keeps those that were held out before.
    assert set(held_out) < set(split(store, 7, seed=3)[1])
    assert len(split(store, 100, seed=3)[1]) == 7  # never more than a quarter
    assert split(store, 0, seed=3) == (list(range(30)), [])


def test_conversations_without_a_row_are_left_out(open_store: Callable[..., FeatureStore]) -> None:
    good = random_samples(4)
    short = TokenSample("short", [5, 6], [False, True])
    untrained = TokenSample("untrained", [5, 6, 7, 8], [False] * 4)
    store = open_store([short, *good, untrained])
    training, held_out = split(store, 1, seed=0)
    assert sorted(training + held_out) == [1, 2, 3, 4]
