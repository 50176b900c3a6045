"""Bounds against hand-made figures and against every path enumerated."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sstf.evaluation.limits import Shape, best_tree, constant_rate_length, grow_together, limits, tree_oracles
from sstf.evaluation.metrics import Record
from sstf.targets import Target
from sstf.types import DraftTree

CPU = torch.device("cpu")


def test_a_constant_rate_by_hand() -> None:
    assert constant_rate_length(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert constant_rate_length(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert (constant_rate_length(1.0, 4), constant_rate_length(0.0, 4)) == (5.0, 1.0)


def test_limits_by_hand() -> None:
    plain = [Record("x", "a", [1] * 10, [], 10.0, 0.0, 9.0)]  # a step of 1 s
    made = [Record("x", "a", [3, 3, 1, 3], [], 8.0, 2.0, 5.0)]  # 10 tokens in 4 passes of 0.5 + 1.25 + 0.25 s
    one = limits("chain", 0.0, made, plain, Shape(2, 2, True), 0.9, None)
    assert one is not None
    assert one.ceiling == 2.5
    assert (one.draft_cost, one.verify_cost, one.host_cost) == (0.5, 1.25, 0.25)
    # the cost model of the same run gives just the measured speedup
    assert one.ceiling / (one.draft_cost + one.verify_cost + one.host_cost) == pytest.approx((10 / 8) / (10 / 10))
    assert one.speedup_if_drafting_were_free == pytest.approx(2.5 / 1.5)
    assert one.constant_rate == pytest.approx(1 + 0.75 + 0.75**2)  # 3 of 4 passes accepted the first
    assert (one.vocabulary_cap, one.tree_oracle) == (0.9, None)
    tree = limits("tree", 0.0, made, plain, Shape(2, 6, False), None, None)
    assert tree is not None and tree.constant_rate is None
    assert (
        limits("chain", 0.0, [Record("x", "a", [], [1], 0.0, 0.0, 0.0)], plain, Shape(2, 2, True), None, None) is None
    )


def oracle_length(table: Tensor, depth: int, nodes: int) -> float:
    """Of a target whose distributions, `table`, depend on the last token alone; the root is 0."""

    def verify(numbers: list[int], trees: list[DraftTree]) -> list[Tensor]:
        return [table[[0, *tree.tokens.tolist()]] for tree in trees]

    [length] = grow_together([best_tree(depth, nodes, CPU)], verify)
    return length


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), nodes=st.integers(1, 12), peak=st.sampled_from([0.3, 3.0]))
def test_the_oracle_is_the_best_of_all_trees(seed: int, depth: int, nodes: int, peak: float) -> None:
    """The best nodes form a tree, so the best tree's mass is the sum of the greatest path masses there are."""
    generator = torch.Generator().manual_seed(seed)
    table = (peak * torch.randn(4, 4, generator=generator, dtype=torch.float64)).softmax(-1)  # by the last token

    masses = []
    for length in range(1, depth + 1):
        for path in product(range(4), repeat=length):
            mass = 1.0
            for above, token in zip((0, *path), path, strict=False):
                mass *= float(table[above, token])
            masses.append(mass)
    expected = 1 + sum(sorted(masses, reverse=True)[:nodes])
    assert oracle_length(table, depth, nodes) == pytest.approx(expected, abs=1e-9)


def test_a_sure_target_is_followed_to_the_end() -> None:
    table = torch.eye(3).roll(1, 1)
    assert oracle_length(table, 4, 10) == 5.0


def test_the_targets_own_oracle(tiny_target: Target) -> None:
    """One level and one node: 1 + the greatest probability; two levels: against passes over whole texts."""
    context = [5, 9, 14, 30, 7]
    with torch.inference_mode():

        def behind(*more: int) -> Tensor:
            ids = torch.tensor([[*context, *more]])
            hidden = tiny_target.decoder(ids, use_cache=False).last_hidden_state[0, -1]
            return tiny_target.frozen_head.native_logits(hidden).float().softmax(-1)

        first = behind()
        best, second = first.topk(2).indices.tolist()
        chain = float(first[best] * behind(best).max())
        other = float(first[second])
    shapes = [Shape(1, 1, True), Shape(2, 2, True), Shape(2, 1, False)]
    found = tree_oracles(tiny_target, [context], shapes, 1.0, 1.0)
    assert found is not None
    assert found[0] == pytest.approx(1 + float(first[best]), rel=1e-4)
    assert found[1] == pytest.approx(1 + float(first[best]) + max(chain, other), rel=1e-4)
    assert found[2] == pytest.approx(found[0])
    assert tree_oracles(tiny_target, [], shapes, 1.0, 1.0) is None


def test_contexts_together_are_the_mean_of_each_alone(tiny_target: Target) -> None:
    """Of different lengths, and trees that stop growing at different levels."""
    contexts = [[5, 9, 14], [7, 7, 7, 8, 30, 21, 4], [40, 2]]
    shapes = [Shape(3, 5, False), Shape(1, 2, True)]
    alone = [tree_oracles(tiny_target, [context], shapes, 0.7, 0.9) for context in contexts]
    together = tree_oracles(tiny_target, contexts, shapes, 0.7, 0.9)
    assert together is not None
    for number, mean in enumerate(together):
        assert mean == pytest.approx(sum(found[number] for found in alone if found) / 3, rel=1e-4)
