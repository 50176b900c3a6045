"""A drawn chain that ends where its drafter is no longer confident: lossless while the decision to verify a draft looks
at the drafts before it, and biased as soon as it looks at the draft itself. Exact, over all drawings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from verification import Exact, Toy, Trees, Verify, all_trees, chain, draw_tree, drawn_tree, exact, near, toy

from sstf.decode import verify_block, verify_sampled, verify_traversal
from sstf.methods.dspark import verified
from sstf.types import DraftTree

LENGTH = 3
RULES: dict[str, Verify] = {
    "block": verify_block,
    "token": lambda tree, target_probs, generator: verify_sampled(tree, target_probs, generator, True),
    "traversal": lambda tree, target_probs, generator: verify_traversal(tree, target_probs, generator, True),
}
Chances = Callable[[list[int]], list[float]]  # of the drafts of a chain


def before(tokens: list[int]) -> list[float]:
    """Of each draft, by those before it: an uneven table."""
    found, product = [], 1.0
    for i in range(len(tokens)):
        last = tokens[i - 1] if i else 0
        product *= (0.9, 0.35, 0.7)[(2 * i + last) % 3]
        found.append(product)
    return found


def itself(tokens: list[int]) -> list[float]:
    """The mistake: of each draft, by its own token."""
    found, product = [], 1.0
    for i, token in enumerate(tokens):
        product *= (0.9, 0.35, 0.7)[(2 * i + token) % 3]
        found.append(product)
    return found


class Rising:
    """What a step that verifies 0, 1, .. drafts costs."""

    def __init__(self, *costs: float) -> None:
        self.costs = costs

    def best_size(self, gains: list[float], depth: int) -> int:
        rates = [(1 + sum(gains[:n])) / self.costs[n] for n in range(len(gains) + 1)]
        return max(range(len(rates)), key=rates.__getitem__)

    def worth_another_level(self, gains: object, frontier: object, depth: int, keep: float = 1.0) -> bool:
        raise AssertionError


EVENLY, AT_ONCE = Rising(1, 1.3, 1.6, 1.9), Rising(1, 2.5, 2.5, 2.5)


def stopped(draft: Toy, chances: Chances, least: float, cost: Rising | None) -> Trees:
    def drawing(generator: torch.Generator) -> DraftTree:
        tokens = draw_tree(draft, chain(LENGTH), True, generator).tokens.tolist()
        keep = verified(chances(tokens), least, cost)
        return drawn_tree(draft, tokens[:keep], list(range(-1, keep - 1)))

    return all_trees(draft, drawing)


def check(chances: Chances, verify: Verify, least: float, cost: Rising | None, seed: int) -> tuple[Exact, Toy, Trees]:
    target = toy(seed)
    draft = near(target, seed + 100)
    trees = stopped(draft, chances, least, cost)
    return exact(target, trees, verify, LENGTH + 1), target, trees


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("least", "cost"), [(0.4, None), (0.0, EVENLY), (0.3, EVENLY)])
def test_lossless(rule: str, least: float, cost: Rising | None, seed: int) -> None:
    found, target, trees = check(before, RULES[rule], least, cost, seed)
    assert len({len(tree) for tree, _ in trees}) > 1  # it stops, not always at the same place
    assert found.distance(target) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_looking_at_the_draft_itself_is_found_out(rule: str) -> None:
    distances = [
        found.distance(target) for found, target, _ in (check(itself, RULES[rule], 0.4, None, s) for s in range(4))
    ]
    assert min(distances) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_choosing_the_best_place_afterwards_is_found_out(rule: str) -> None:
    """The best of all places instead of the first fall, where all passes cost the same: the chance of the second
    draft, which depends on the first, then decides whether the first is verified."""

    def best(draft: Toy) -> Trees:
        def drawing(generator: torch.Generator) -> DraftTree:
            tokens = draw_tree(draft, chain(LENGTH), True, generator).tokens.tolist()
            keep = AT_ONCE.best_size(before(tokens), 1)
            return drawn_tree(draft, tokens[:keep], list(range(-1, keep - 1)))

        return all_trees(draft, drawing)

    distances = []
    for seed in range(4):
        target = toy(seed)
        distances.append(exact(target, best(near(target, seed + 100)), RULES[rule], LENGTH + 1).distance(target))
    assert max(distances) > 1e-3
