from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sstf.features import FeatureSpec
from sstf.methods import DraftMethod, NgramConfig, TrainableMethod, build_method
from sstf.methods.base import News
from sstf.targets import Target
from sstf.trees import Chain, DraftContext, DynamicTree

CPU = torch.device("cpu")


def news(tokens: list[int]) -> News:
    return News(0, tokens, torch.empty(len(tokens), 0))


def propose(history: list[list[int]], depth: int = 3, min_n: int = 2, max_n: int = 4) -> list[int]:
    """The drafted chain after tokens that arrived in these pieces."""
    drafter = build_method(NgramConfig(min_n=min_n, max_n=max_n)).drafter(None, CPU)
    drafter.start(1, 64)
    for piece in history:
        (tree,) = drafter.propose([news(piece)], Chain(depth=depth), DraftContext(64))
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
    found: list[int] = tree.tokens.tolist()
    return found


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),  # 1 2 stood before, followed by 3 4 5
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1]),  # the latest place wins
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # but a longer match comes first: 7 1 2
        ([1, 2, 3, 4], []),
        ([1], []),
        ([5, 5, 5], [5]),  # may overlap itself; what follows it ends with the text
        ([3, 1, 3], []),  # one token is less than min_n
    ],
)
def test_by_hand(history: list[int], expected: list[int]) -> None:
    assert propose([history]) == expected


def test_min_n_of_one() -> None:
    assert propose([[3, 1, 4, 3]], min_n=1) == [1, 4, 3]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_as_a_search_and_however_the_tokens_arrive(history: list[int], data: st.DataObject) -> None:
    expected: list[int] = []
    for n in (4, 3, 2):
        ends = [end for end in range(n, len(history)) if history[end - n : end] == history[-n:]]
        if ends:
            expected = history[ends[-1] : ends[-1] + 3]
            break
    assert propose([history]) == expected
    cut = data.draw(st.integers(1, len(history)))
    assert propose([history[:cut], history[cut:]] if cut < len(history) else [history]) == expected


def test_reads_no_features_and_learns_nothing(tiny_target: Target) -> None:
    method = build_method(NgramConfig())
    assert method.feature_spec(tiny_target.spec) == FeatureSpec(())
    assert isinstance(method, DraftMethod) and not isinstance(method, TrainableMethod)


def test_never_drafts_more_than_the_policy_verifies() -> None:
    drafter = build_method(NgramConfig()).drafter(None, CPU)
    drafter.start(1, 64)
    tokens = [*range(20), 0, 1]
    (tree,) = drafter.propose([news(tokens)], DynamicTree(depth=9, top_k=1, total_tokens=4), DraftContext(64))
    assert tree.tokens.tolist() == [2, 3, 4, 5]


def test_orders_of_the_wrong_way_round() -> None:
    with pytest.raises(ValidationError, match="min_n is 3, expected at most max_n, which is 2"):
        NgramConfig(min_n=3, max_n=2)
