from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verification import Toy, Verify, distance, enumerate_rule, exact, node_paths, outcomes, p_value, toy, tree_of

import sstf.decode.verify as rules
from sstf.decode import Verified, verify_deterministic, verify_greedy
from sstf.decode.verify import draw
from sstf.errors import DecodeError
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


def accepts_with_draft_probability(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    draft = draft_rows(tree, target_probs)

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if rules.uniform(generator) < float(draft[node + 1, tokens[child]]):
                return child, -1
            probs[tokens[child]] = 0
        return None, rules.draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

    return walk(tree, chooses)


def does_not_renormalise(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if rules.uniform(generator) < float(probs[tokens[child]]):  # not divided by what is left
                return child, -1
            probs[tokens[child]] = 0
        return None, rules.draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

    return walk(tree, chooses)


def bonus_from_the_whole_distribution(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            if rules.uniform(generator) < float(probs[tokens[child]] / probs.sum()):
                return child, -1
            probs[tokens[child]] = 0
        return None, rules.draw(target_probs[node + 1], generator)

    return walk(tree, chooses)


def treats_top_k_as_sampled(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    draft = draft_rows(tree, target_probs)

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        for child in candidates:
            token = tokens[child]
            if rules.uniform(generator) < float(probs[token] / draft[node + 1, token]):
                return child, -1
            left = (probs - draft[node + 1]).clamp_min(0)
            probs = left / left.sum() if float(left.sum()) > 0 else probs
        return None, rules.draw(probs, generator)

    return walk(tree, chooses)


def uses_one_number_twice(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    """Siblings share one uniform number."""

    def chooses(node: int, candidates: list[int], tokens: list[int]) -> tuple[int | None, int]:
        probs = target_probs[node + 1].double().clone()
        number = rules.uniform(generator) if candidates else 0.0
        for child in candidates:
            if number < float(probs[tokens[child]] / probs.sum()):
                return child, -1
            probs[tokens[child]] = 0
        return None, rules.draw(probs if float(probs.sum()) > 0 else target_probs[node + 1], generator)

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
    found = outcomes(verify_deterministic, tree_of((1,), (0,)), probs)
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
    assert outcomes(verify_deterministic, tree, probs) == {((), 1): 1.0}


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{len(tree)}-nodes")
def test_bisection_finds_the_same(tree: DraftTree) -> None:
    """The enumerator that knows nothing of `uniform` and `draw`."""
    rows = toy(len(tree), zeros=True).rows(tree)
    found, slow = outcomes(verify_deterministic, tree, rows), enumerate_rule(verify_deterministic, tree, rows)
    assert found.keys() == slow.keys()
    assert max(abs(found[key] - slow[key]) for key in found) < 1e-12


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("total", [1 - 2**-24, 1.0, 1 + 2**-23])
def test_rejected_children_that_exhaust_the_mass(monkeypatch: pytest.MonkeyPatch, total: float, number: float) -> None:
    """Float32 rows sum to one but for rounding, so the last possible child may be rejected: the token that must come
    then is still a possible one. An impossible child that follows is never accepted."""
    monkeypatch.setattr(rules, "uniform", lambda _: number)
    rows = torch.tensor([[0.3, 0.7 * total, 0.0]]).expand(4, 3)
    found = verify_deterministic(tree_of((0,), (1,), (2,)), rows, torch.Generator())
    assert 2 not in (*found.tokens, found.bonus)
    chain = verify_deterministic(tree_of((2,), (1,), (0,)), rows, torch.Generator())
    assert 2 not in (*chain.tokens, chain.bonus)


def test_a_repeated_sibling_gets_no_second_chance() -> None:
    """Half the mass is gone with the first 0; the second 0 must not be accepted from what is left."""
    tree = DraftTree(torch.tensor([0, 0, 1]), torch.tensor([-1, -1, -1]))
    found = outcomes(verify_deterministic, tree, torch.tensor([[0.5, 0.25, 0.25]]).expand(4, 3))
    accepted = {nodes: sum(chance for key, chance in found.items() if key[0] == nodes) for nodes, _ in found}
    assert accepted == pytest.approx({(0,): 0.5, (2,): 0.25, (): 0.25}, abs=1e-12)


def test_rows_must_fit_the_tree() -> None:
    with pytest.raises(DecodeError, match="for each of the 2 nodes"):
        verify_deterministic(tree_of((0,), (1,)), torch.full((2, 3), 1 / 3), torch.Generator())


def test_reads_the_device_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many children there are. (The tree itself is read from the CPU.)"""
    reads = []
    for name in ("item", "__float__", "__int__", "__bool__"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, plain=plain: (reads.append(1), plain(self))[1])
    monkeypatch.setattr(rules, "uniform", lambda _: 0.5)
    for tree in TREES:
        reads.clear()
        found = verify_deterministic(tree, torch.full((len(tree) + 1, 3), 1 / 3), torch.Generator())
        assert len(reads) == len(found.nodes) + 1


@given(tree=small_trees(), other=small_trees(), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_text_of_a_seed_does_not_depend_on_the_trees(tree: DraftTree, other: DraftTree, seed: int) -> None:
    """Ten tokens in passes with one tree, and in passes with another."""
    target, texts = toy(seed), []
    for drafted in (tree, other, DraftTree.empty(torch.device("cpu"))):
        generator, text = torch.Generator().manual_seed(seed), [0, 0]
        while len(text) < 12:
            rows = torch.stack([target.after((*text, *path)) for path in ((), *node_paths(drafted))])
            found = verify_deterministic(drafted, rows, generator)
            text += [*found.tokens, found.bonus]
        texts.append(text[:12])
    assert texts[0] == texts[1] == texts[2]


def test_real_random_numbers() -> None:
    """5,000 draws are enough for these wrong rules, see `ENOUGH` in test_verify_drawn.py."""
    target, trees = toy(5), [(TREES[0], 1.0)]
    assert p_value(target, trees, verify_deterministic, 5_000, 2) > 1e-4
    for wrong in (bonus_from_the_whole_distribution, does_not_renormalise):
        assert exact(target, trees, wrong, 2).divergence(target) * 5_000 > 100
        assert p_value(target, trees, wrong, 5_000, 2) < 1e-4


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_of_the_cumulative_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    generator = torch.Generator()
    numbers = {0.0: 1, 0.49: 1, 0.5: 3, 0.74: 3, 0.75: 4, 1 - 2**-53: 4}
    for number, token in numbers.items():
        monkeypatch.setattr(torch, "rand", lambda *_, n=number, **__: torch.tensor(n, dtype=torch.float64))
        assert draw(probs, generator) == token
        assert draw(probs * 0.3, generator) == token  # needs no normalisation


@pytest.mark.parametrize("row", [[0.0, 0.0], [float("nan"), 0.5], [0.5, float("nan")]])
def test_nothing_is_drawn_from_no_distribution(row: list[float]) -> None:
    with pytest.raises(DecodeError, match="has no mass"):
        draw(torch.tensor(row), torch.Generator())


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
