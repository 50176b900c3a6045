from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verification import Toy, Verify, distance, enumerate_rule, toy, tree_of

from sstf.decode import Verified, verify_deterministic, verify_greedy
from sstf.decode.verify import draw
from sstf.trees import children
from sstf.types import DraftTree

# Over three tokens, depth 2: wide, narrow, lopsided, every token, one, none.
TREES = [
    tree_of((0,), (1,), (0, 1), (0, 2), (1, 0)),
    tree_of((2,), (2, 2), (2, 0)),
    tree_of((1,), (1, 1)),
    tree_of((2,), (0,), (1,), (0, 0)),
    tree_of((0,), (2,), (1,), (0, 2), (0, 1), (0, 0), (2, 1)),
    tree_of((0,)),
    DraftTree.empty(torch.device("cpu")),
]


# ---- wrong rules, which the same check must catch --------------------------------------------------------------------


def draft_rows(tree: DraftTree, target_probs: Tensor) -> Tensor:
    """A draft distribution at every node that is near the target but not equal, best tokens first or not."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(target_probs.shape, generator=generator, dtype=torch.float64)
    rows = target_probs.double() * 0.6 + 0.4 * noise / noise.sum(-1, keepdim=True)
    return rows / rows.sum(-1, keepdim=True)


def walk(tree: DraftTree, chooses: object) -> Verified:
    tokens, below = tree.tokens.tolist(), children(tree.parents.tolist())
    path: list[int] = []
    node = -1
    while True:
        accepted, bonus = chooses(node, below.get(node, []), tokens)  # type: ignore[operator]
        if accepted is None:
            return Verified(path, [tokens[i] for i in path], bonus)
        path.append(accepted)
        node = accepted


def uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def accepts_with_draft_probability(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    draft = draft_rows(tree, target_probs)

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if uniform(generator) < float(draft[node + 1, tokens[child]]):
                return child, -1
            probs[tokens[child]] = 0
        return None, draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

    return walk(tree, chooses)


def does_not_renormalise(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if uniform(generator) < float(probs[tokens[child]]):  # not divided by what is left
                return child, -1
            probs[tokens[child]] = 0
        return None, draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

    return walk(tree, chooses)


def bonus_from_the_whole_distribution(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if uniform(generator) < float(probs[tokens[child]] / probs.sum()):
                return child, -1
            probs[tokens[child]] = 0
        return None, draw(target_probs[node + 1], generator)

    return walk(tree, chooses)


def treats_top_k_as_sampled(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    draft = draft_rows(tree, target_probs)

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            token = tokens[child]
            if uniform(generator) < float(probs[token] / draft[node + 1, token]):
                return child, -1
            left = (probs - draft[node + 1]).clamp_min(0)
            probs = left / left.sum()
        return None, draw(probs, generator)

    return walk(tree, chooses)


def uses_one_number_twice(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    """Siblings share one uniform number."""

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        number = uniform(generator) if candidates else 0.0
        for child in candidates:
            if number < float(probs[tokens[child]] / probs.sum()):
                return child, -1
            probs[tokens[child]] = 0
        return None, draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

    return walk(tree, chooses)


MUTANTS: list[Verify] = [
    accepts_with_draft_probability,
    does_not_renormalise,
    bonus_from_the_whole_distribution,
    treats_top_k_as_sampled,
    uses_one_number_twice,
]


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{len(tree)}-nodes")
def test_emits_exactly_the_targets_distribution(tree: DraftTree, zeros: bool) -> None:
    assert distance(toy(len(tree), zeros=zeros), tree, verify_deterministic) < 1e-12


def test_four_tokens() -> None:
    tree = tree_of((3,), (1,), (3, 0), (3, 3), (1, 2))
    assert distance(toy(9, vocab=4), tree, verify_deterministic) < 1e-12


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_wrong_rules_fail_the_same_check(mutant: Verify) -> None:
    assert distance(toy(5), TREES[0], mutant) > 0.01


@st.composite
def small_trees(draw_from: st.DrawFn) -> DraftTree:
    """Any set of paths of up to two tokens over three, siblings in any order."""
    paths: list[tuple[int, ...]] = []
    for token in draw_from(st.permutations(range(3)))[: draw_from(st.integers(0, 3))]:
        paths.append((token,))
    for first in [path[0] for path in paths]:
        below = draw_from(st.permutations(range(3)))[: draw_from(st.integers(0, 2))]
        paths += [(first, token) for token in below]
    return tree_of(*paths) if paths else DraftTree.empty(torch.device("cpu"))


@given(tree=small_trees(), seed=st.integers(0, 1000), zeros=st.booleans())
@settings(deadline=None, max_examples=12)
def test_any_tree(tree: DraftTree, seed: int, zeros: bool) -> None:
    assert distance(toy(seed, zeros=zeros), tree, verify_deterministic) < 1e-12


def test_acceptance_by_hand() -> None:
    """Target 1/2, 1/4, 1/4; children 1 then 0: 1 with 1/4; else 0 with (1/2)/(3/4), so 1/2 in all; else 2."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    found = enumerate_rule(verify_deterministic, tree_of((1,), (0,)), probs)
    expected = {((0,), 1): 0.25, ((1,), 0): 0.125, ((1,), 1): 0.125, ((1,), 2): 0.25, ((), 2): 0.25}
    assert found.keys() == expected.keys()
    for outcome, chance in expected.items():
        assert found[outcome] == pytest.approx(chance, abs=1e-12)


def test_draft_equal_to_a_certain_target_is_always_accepted() -> None:
    chain = tree_of((2,), (2, 0), (2, 0, 1))
    probs = torch.eye(3)[[2, 0, 1, 1]]
    for seed in range(20):
        found = verify_deterministic(chain, probs, torch.Generator().manual_seed(seed))
        assert found == Verified([0, 1, 2], [2, 0, 1], 1)


def test_impossible_children_are_never_accepted() -> None:
    tree = tree_of((0,), (2,), (0, 1))
    probs = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert enumerate_rule(verify_deterministic, tree, probs) == {((), 1): 1.0}


def test_real_random_numbers() -> None:
    """What the enumeration cannot see: that the numbers are independent. 20,000 draws find a distance of 0.01."""
    target, tree = toy(3), TREES[0]
    rows = target.rows(tree)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(draws):
        found = verify_deterministic(tree, rows, generator)
        tokens = [*found.tokens, found.bonus]
        second = tokens[1] if len(tokens) > 1 else draw(target.after((tokens[0],)), generator)
        counts[tokens[0], second] += 1
    expected = target.first[:, None] * target.second * draws
    statistic = ((counts - expected) ** 2 / expected).sum()
    tail = 1 - torch.special.gammainc(torch.tensor(8 / 2, dtype=torch.float64), statistic / 2)
    assert float(tail) > 1e-3


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_of_the_cumulative_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    generator = torch.Generator()
    numbers = {0.0: 1, 0.49: 1, 0.5: 3, 0.74: 3, 0.75: 4, 1 - 2**-53: 4}
    for number, token in numbers.items():
        monkeypatch.setattr(torch, "rand", lambda *_, n=number, **__: torch.tensor(n, dtype=torch.float64))
        assert draw(probs, generator) == token
        assert draw(probs * 0.3, generator) == token  # needs no normalisation


@given(seed=st.integers(0, 10_000), vocab=st.integers(1, 200))
def test_impossible_tokens_are_never_drawn(seed: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(vocab, generator=generator) * (torch.rand(vocab, generator=generator) > 0.7)
    probs[seed % vocab] = 1e-30
    assert float(probs[draw(probs, generator)]) > 0


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_walk_by_hand() -> None:
    """Root children 5, 7; below 7: 1, 2; below (7, 2): 9. The target says 7, then 2, then 4 at that node."""
    tree = tree_of((5,), (7,), (5, 1), (7, 1), (7, 2), (7, 2, 9))
    #                       root 5  7  51 71 72 729
    assert verify_greedy(tree, [7, 1, 2, 0, 0, 4, 0]) == Verified([1, 4], [7, 2], 4)
    assert verify_greedy(tree, [7, 1, 2, 0, 0, 9, 3]) == Verified([1, 4, 5], [7, 2, 9], 3)
    assert verify_greedy(tree, [6, 1, 2, 0, 0, 9, 3]) == Verified([], [], 6)
    assert verify_greedy(tree, [5, 1, 2, 8, 0, 9, 3]) == Verified([0, 2], [5, 1], 8)
    assert verify_greedy(DraftTree.empty(torch.device("cpu")), [3]) == Verified([], [], 3)


@given(tree=small_trees(), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_greedy_is_sampling_from_certain_distributions(tree: DraftTree, seed: int) -> None:
    best = torch.randint(3, (len(tree) + 1,), generator=torch.Generator().manual_seed(seed))
    found = verify_greedy(tree, best.tolist())
    assert found == verify_deterministic(tree, torch.eye(3)[best], torch.Generator().manual_seed(seed))


def test_the_toy_target_is_a_distribution() -> None:
    target: Toy = toy(1, zeros=True)
    assert float(target.joint().sum()) == pytest.approx(1, abs=1e-12)
    assert bool((target.joint() == 0).any())
