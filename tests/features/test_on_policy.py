"""The share of trained tokens that are the target's own first choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, extract
from sstf.features.on_policy import argmax_share
from sstf.targets import Target
from sstf.types import TokenSample


def greedy(target: Target, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(target.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(("altered", "expected"), [(0, 1.0), (5, None)])
def test_greedy_answers_are_the_first_choice(
    tiny_target: Target, tmp_path: Path, altered: int, expected: float | None
) -> None:
    mask = [False] * 4 + [True] * 20
    samples = []
    for i in range(3):
        ids = greedy(tiny_target, [5 + i, 9, 20 + i, 31], 20)
        # Another token than the first choice; what follows it was chosen after the old one.
        for t in range(altered):
            ids[8 + t] = (ids[8 + t] + 1) % 300
        samples.append(TokenSample(str(i), ids, mask))
    by_hand = hits = 0
    for sample in samples:
        first = tiny_target.model(torch.tensor([sample.input_ids]), use_cache=False).logits[0].argmax(-1).tolist()
        hits += sum(first[t - 1] == sample.input_ids[t] for t in range(4, 24))
        by_hand += 20
    extract(tiny_target, samples, FeatureSpec((1, 3, 4)), ExtractConfig(), tmp_path, NoProgress())
    share = argmax_share(FeatureStore(tmp_path))
    assert share == hits / by_hand
    if expected is not None:
        assert share == expected
    else:
        assert share < 0.9
