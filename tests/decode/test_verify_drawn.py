"""Rules for trees that were drawn at random: exact over all drawings, next to wrong rules that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verification import (
    Exact,
    Shape,
    Toy,
    Trees,
    Verify,
    all_trees,
    chain,
    draw_tree,
    enumerate_rule,
    exact,
    near,
    outcomes,
    p_value,
    toy,
    tree_of,
    trees_of,
)

import sstf.decode.verify as rules
from sstf.decode import Verified, verify_block, verify_deterministic, verify_sampled, verify_traversal
from sstf.errors import DecodeError
from sstf.trees import children
from sstf.types import DraftTree

PAIR: Shape = ((), ())
FORK: Shape = (((), ()),)  # one token, then two
TWO_CHAINS: Shape = (chain(1), chain(1))
LOPSIDED: Shape = ((), chain(2), ())
BUSHY: Shape = (PAIR, chain(1))
SHAPES = {
    "leaf": chain(1),
    "pair": PAIR,
    "triple": ((), (), ()),
    "fork": FORK,
    "two-chains": TWO_CHAINS,
    "bushy": BUSHY,
    "lopsided": LOPSIDED,
    "chain-2": chain(2),
    "chain-3": chain(3),
}


def sampled(replacement: bool) -> Verify:
    return lambda tree, target_probs, generator: verify_sampled(tree, target_probs, generator, replacement)


def traversal(replacement: bool) -> Verify:
    return lambda tree, target_probs, generator: verify_traversal(tree, target_probs, generator, replacement)


def depth(shape: Shape) -> int:
    return 1 + max(depth(child) for child in shape) if shape else 0


def check(target: Toy, draft: Toy, shape: Shape, replacement: bool, verify: Verify) -> Exact:
    """Over the tokens of the longest path and its bonus token."""
    return exact(target, trees_of(draft, shape, replacement), verify, depth(shape) + 1)


# ---- the same rules in plain Python, right and wrong -----------------------------------------------------------------


def chance_of(chance: float, target: float, draft: float) -> float:
    return min(1.0, chance * target / draft) if draft > 0 else 0.0


def residual(target: list[float], draft: list[float], chance: float = 1.0) -> tuple[list[float], float]:
    left = [max(chance * a - b, 0.0) for a, b in zip(target, draft, strict=True)]
    mass = math.fsum(left)
    return ([a / mass for a in left] if mass > 0 else target), mass


def without(draft: list[float], token: int, normalise: bool = True) -> list[float]:
    left = [0.0 if i == token else b for i, b in enumerate(draft)]
    mass = math.fsum(left)
    return [b / mass for b in left] if normalise and mass > 0 else left


def pick(row: list[float], generator: torch.Generator) -> int:
    return rules.draw(torch.tensor(row, dtype=torch.float64), generator)


@dataclass(frozen=True)
class Plain:
    """The three rules on lists of floats, each line as in its paper; a flag makes one of the mistakes."""

    replacement: bool = True
    draft_not_renormalised: bool = False
    residual_not_scaled: bool = False
    parent_not_updated: bool = False
    descendants_not_updated: bool = False
    last_token_alone: bool = False
    chance_not_carried: bool = False
    chance_for_all: bool = False

    def token_by_token(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
        assert tree.draft_probs is not None
        tokens, below = tree.tokens.tolist(), children(tree.parents.tolist())
        path: list[int] = []
        while True:
            node = path[-1] if path else -1
            target, draft = target_probs[node + 1].tolist(), tree.draft_probs[node + 1].tolist()
            for child in below.get(node, []):
                token = tokens[child]
                if rules.uniform(generator) < chance_of(1.0, target[token], draft[token]):
                    path.append(child)
                    break
                target, _ = residual(target, draft)
                if not self.replacement:
                    draft = without(draft, token, not self.draft_not_renormalised)
            else:
                return Verified(path, [tokens[i] for i in path], pick(target, generator))

    def block(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
        assert tree.draft_probs is not None
        tokens, size = tree.tokens.tolist(), len(tree)
        target, draft = target_probs.double().tolist(), tree.draft_probs.double().tolist()
        ratios = [target[i][token] / draft[i][token] for i, token in enumerate(tokens)]
        chances = [1.0]
        for ratio in ratios:
            chances.append(min(1.0, ratio if self.chance_not_carried else chances[-1] * ratio))
        accept, rest = [], []
        for i in range(size):
            left, mass = residual(target[i], draft[i], 1.0 if self.residual_not_scaled else chances[i])
            rest.append(left)
            ends_here = mass / (mass + (1 - chances[i])) if mass > 0 else 0.0
            accept.append(chances[i] if self.chance_for_all else ends_here)
        accept.append(min(1.0, ratios[-1]) if self.last_token_alone and size else chances[-1])
        rest.append(target[size])
        kept = 0
        for i in range(1, size + 1):
            if rules.uniform(generator) < accept[i]:
                kept = i
        return Verified(list(range(kept)), tokens[:kept], pick(rest[kept], generator))

    def traverse(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
        """Recursive: `visit` decides the subtree of a node and returns the accepted path below it, or None."""
        assert tree.draft_probs is not None
        tokens, below = tree.tokens.tolist(), children(tree.parents.tolist())
        at_start = {
            node: chance
            for node, chance in zip([-1, *range(len(tree))], self._starting_chances(tree, target_probs), strict=True)
        }
        draft_rows: list[list[float]] = tree.draft_probs.tolist()
        target_rows: list[list[float]] = target_probs.tolist()

        def visit(node: int, chance: float) -> tuple[list[int], list[float]] | None:
            target, draft = target_rows[node + 1], draft_rows[node + 1]
            for child in below.get(node, []):
                token = tokens[child]
                follows = chance_of(chance, target[token], draft[token])
                found = visit(child, at_start[child] if self.descendants_not_updated else follows)
                if found is not None:
                    return [child, *found[0]], found[1]
                target, mass = residual(target, draft, 1.0 if self.residual_not_scaled else chance)
                if not self.parent_not_updated:
                    chance = mass / (mass + (1 - chance)) if mass > 0 else 0.0
                if not self.replacement:
                    draft = without(draft, token, not self.draft_not_renormalised)
            return ([], target) if node == -1 or rules.uniform(generator) < chance else None

        found = visit(-1, 1.0)
        assert found is not None
        path, rest = found
        return Verified(path, [tokens[i] for i in path], pick(rest, generator))

    def _starting_chances(self, tree: DraftTree, target_probs: Tensor) -> list[float]:
        assert tree.draft_probs is not None
        chances = [1.0]
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            at = (parent + 1, token)
            chances.append(chance_of(chances[parent + 1], float(target_probs[at]), float(tree.draft_probs[at])))
        return chances


def token_by_token(**flags: bool) -> Verify:
    return Plain(**flags).token_by_token


def block(**flags: bool) -> Verify:
    return Plain(**flags).block


def traverse(**flags: bool) -> Verify:
    return Plain(**flags).traverse


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True], ids=["full", "zeros"])
@pytest.mark.parametrize("replacement", [True, False], ids=["iid", "without"])
@pytest.mark.parametrize("name", SHAPES)
def test_emits_exactly_the_targets_distribution(name: str, replacement: bool, zeros: bool) -> None:
    shape = SHAPES[name]
    # With four tokens, rows with zeros still leave something to choose from.
    target = toy(len(name), 4 if zeros else 3, zeros)
    draft = toy(len(name) + 50, target.vocab, zeros)
    trees = trees_of(draft, shape, replacement)
    assert sum(weight for _, weight in trees) == pytest.approx(1, abs=1e-12)
    verifiers = [sampled(replacement), traversal(replacement)]
    if name.startswith("chain"):
        verifiers.append(verify_block)
    for verify in verifiers:
        assert exact(target, trees, verify, depth(shape) + 1).distance(target) < 1e-12


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["pair", "triple", "fork", "two-chains", "chain-2", "chain-3"]),
    vocab=st.integers(2, 4),
    share=st.sampled_from([0.0, 0.5, 0.9]),
    zeros=st.tuples(st.booleans(), st.booleans()),
    replacement=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_distributions(
    seed: int, name: str, vocab: int, share: float, zeros: tuple[bool, bool], replacement: bool
) -> None:
    """Exact, and deciding whole paths accepts at least as many tokens as deciding one after the other."""
    shape, target = SHAPES[name], toy(seed, vocab, zeros[0])
    trees = trees_of(near(target, seed + 1, share, zeros[1]), shape, replacement)
    single = exact(target, trees, sampled(replacement), depth(shape) + 1)
    whole = exact(target, trees, traversal(replacement), depth(shape) + 1)
    assert max(single.distance(target), whole.distance(target)) < 1e-12
    assert whole.accepted > single.accepted - 1e-12


@pytest.mark.parametrize("replacement", [True, False], ids=["iid", "without"])
def test_children_may_be_fewer_than_planned(replacement: bool) -> None:
    """How many siblings are drawn may depend on the distribution that they are drawn from, and on tokens above."""
    target = toy(4)
    draft = near(target, 5)

    def drawing(generator: torch.Generator) -> DraftTree:
        first = rules.draw(draft.first, generator)
        tokens, parents, row = [first], [-1], draft.second[first]
        for _ in range(2 if float(row[0]) > float(row[1]) else 1):
            tokens.append(rules.draw(row, generator))
            parents.append(0)
            row = row if replacement else row.index_fill(-1, torch.tensor(tokens[-1]), 0)
        tree = DraftTree(torch.tensor(tokens), torch.tensor(parents))
        return replace(tree, draft_probs=draft.rows(tree))

    trees = all_trees(draft, drawing)
    assert {len(tree) for tree, _ in trees} == {2, 3}
    for verify in (sampled(replacement), traversal(replacement)):
        assert exact(target, trees, verify).distance(target) < 1e-12


@pytest.mark.parametrize("name", SHAPES)
def test_the_plain_rules_agree_outcome_by_outcome(name: str) -> None:
    """A fast path and its slow twin: recursive where it loops, forwards where it goes back."""
    shape, target = SHAPES[name], toy(len(name) + 7)
    draft = near(target, 8, 0.4, zeros=True)
    for replacement in (True, False):
        pairs = [
            (sampled(replacement), token_by_token(replacement=replacement)),
            (traversal(replacement), traverse(replacement=replacement)),
        ]
        if name.startswith("chain"):
            pairs += [(verify_block, block()), (verify_block, traversal(replacement))]
        for tree, _ in trees_of(draft, shape, replacement)[:12]:
            for fast, slow in pairs:
                a, b = (outcomes(verify, tree, target.rows(tree)) for verify in (fast, slow))
                assert a.keys() == b.keys()
                assert max(abs(a[key] - b[key]) for key in a) < 1e-12


@pytest.mark.parametrize("verify", [sampled(True), sampled(False), traversal(True), traversal(False), verify_block])
def test_bisection_finds_the_same(verify: Verify) -> None:
    """The enumerator that knows nothing of `uniform` and `draw`, on the rules as they are."""
    target = toy(3)
    shape = chain(2) if verify is verify_block else BUSHY
    tree, _ = trees_of(near(target, 6), shape, False)[1]
    a, b = outcomes(verify, tree, target.rows(tree)), enumerate_rule(verify, tree, target.rows(tree))
    assert a.keys() == b.keys()
    assert max(abs(a[key] - b[key]) for key in a) < 1e-12


def test_bfloat16_and_float32_rows() -> None:
    """Rows come rounded. What is emitted is then the target's as far as the rows are distributions."""
    target = toy(12)
    draft = near(target, 13)

    def rounded(verify: Verify, dtype: torch.dtype) -> Verify:
        return lambda tree, target_probs, generator: verify(
            replace(tree, draft_probs=tree.draft_probs.to(dtype)),  # type: ignore[union-attr]
            target_probs.to(dtype),
            generator,
        )

    for dtype, error in ((torch.float32, 1e-7), (torch.bfloat16, 8e-3)):
        for verify in (sampled(False), traversal(False), verify_deterministic):
            assert check(target, draft, TWO_CHAINS, False, rounded(verify, dtype)).distance(target) < error


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_block_verification_by_hand() -> None:
    """The paper's example: target (1/3, 2/3), draft (2/3, 1/3), two tokens. Token by token accepts 10/9 on average,
    block verification 11/9."""
    target_row = torch.tensor([1, 2], dtype=torch.float64) / 3
    target = Toy(target_row, target_row.expand(2, 2), target_row.expand(2, 2, 2))
    draft = Toy(target_row.flip(0), target_row.flip(0).expand(2, 2), target_row.flip(0).expand(2, 2, 2))
    trees = trees_of(draft, chain(2), True)
    assert exact(target, trees, sampled(True)).accepted == pytest.approx(10 / 9, abs=1e-12)
    for verify in (verify_block, traversal(True)):
        assert exact(target, trees, verify).accepted == pytest.approx(11 / 9, abs=1e-12)


def test_acceptance_of_one_drawn_token_is_the_overlap() -> None:
    for seed in range(5):
        target, draft = toy(seed, 4), toy(seed + 20, 4)
        overlap = float(torch.minimum(target.first, draft.first).sum())
        for verify in (sampled(True), traversal(False), verify_block):
            assert check(target, draft, chain(1), True, verify).accepted == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("length", [2, 3])
def test_block_verification_never_accepts_less(length: int) -> None:
    gains = []
    for seed in range(40):
        target = toy(seed, 3, zeros=seed % 3 == 0)
        trees = trees_of(near(target, seed + 100, (seed % 4) / 4), chain(length), True)
        single, whole = (exact(target, trees, verify, 1).accepted for verify in (sampled(True), verify_block))
        gains.append(whole - single)
    assert min(gains) > -1e-12
    assert max(gains) > 0.05


@pytest.mark.parametrize("replacement", [True, False], ids=["iid", "without"])
@pytest.mark.parametrize("name", ["pair", "fork", "two-chains", "lopsided"])
def test_traversal_never_accepts_less(name: str, replacement: bool) -> None:
    gains = []
    for seed in range(4):
        target = toy(seed, 3, zeros=seed % 3 == 0)
        trees = trees_of(near(target, seed + 100, (seed % 4) / 4), SHAPES[name], replacement)
        single, whole = (
            exact(target, trees, verify, 1).accepted for verify in (sampled(replacement), traversal(replacement))
        )
        gains.append(whole - single)
    assert min(gains) > -1e-12
    # On one level both are the same rule.
    assert max(gains) < 1e-12 if name == "pair" else max(gains) > 0.003


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draft_equal_to_the_target_is_always_accepted(dtype: torch.dtype, zeros: bool) -> None:
    """The whole chain, or the first branch of a tree, with any numbers. Every residual on the way is zero."""
    target = toy(31, 5, zeros)
    for shape in (chain(3), LOPSIDED[1:], BUSHY):
        verifiers = [sampled(True), sampled(False), traversal(True), traversal(False)]
        for seed in range(25):
            generator = torch.Generator().manual_seed(seed)
            for verify in [*verifiers, verify_block] if shape == chain(3) else verifiers:
                tree = draw_tree(target, shape, True, generator)
                tree = replace(tree, draft_probs=target.rows(tree).to(dtype))
                found = verify(tree, target.rows(tree).to(dtype), generator)
                assert len(found.nodes) == depth(shape[:1])
                assert float(target.after(tuple(found.tokens))[found.bonus]) > 0


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-16, 1e-12, 1e-7]), replacement=st.booleans())
@settings(deadline=None, max_examples=40)
def test_nearly_equal_rows_and_extreme_numbers(seed: int, scale: float, replacement: bool) -> None:
    """Residuals made of rounding: whichever way the numbers fall, no NaN and no impossible token."""
    target = toy(seed, 4, zeros=True)
    draft = Toy(*(rows * (1 + scale * torch.rand(rows.shape)) for rows in (target.first, target.second, target.third)))
    generator = torch.Generator().manual_seed(seed)
    for shape in (chain(3), TWO_CHAINS, ((), (), ())):
        tree = draw_tree(draft, shape, replacement, generator)
        verifiers = [sampled(replacement), traversal(replacement), verify_deterministic]
        for verify in [*verifiers, verify_block] if shape == chain(3) else verifiers:
            for number in (0.0, 0.5, 1 - 2**-53):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(rules, "uniform", lambda _, number=number: number)
                    found = verify(tree, target.rows(tree), generator)
                assert float(target.after(tuple(found.tokens))[found.bonus]) > 0


# ---- wrong rules, which the same check must catch --------------------------------------------------------------------


def with_one_number(verify: Verify) -> Verify:
    def wrong(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
        number = rules.uniform(generator)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rules, "uniform", lambda _: number)
            return verify(tree, target_probs, generator)

    return wrong


def with_bonus_from(verify: Verify, warp: Callable[[Tensor], Tensor]) -> Verify:
    """The bonus token from the target's row, not from what is left of it."""

    def wrong(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
        found = verify(tree, target_probs, generator)
        row = target_probs[(found.nodes or [-1])[-1] + 1]
        return replace(found, bonus=rules.draw(warp(row), generator))

    return wrong


def warmer(row: Tensor) -> Tensor:
    """The row before the temperature of 1/2 was applied."""
    return row.sqrt()


def as_it_is(row: Tensor) -> Tensor:
    return row


# name: (rule, shape, drawn with replacement)
WRONG: dict[str, tuple[Verify, Shape, bool]] = {
    "block-last-token-alone": (block(last_token_alone=True), chain(2), True),
    "block-chance-not-carried": (block(chance_not_carried=True), chain(2), True),
    "block-residual-not-scaled": (block(residual_not_scaled=True), chain(2), True),
    "block-chance-for-all": (block(chance_for_all=True), chain(2), True),
}
for _replacement in (True, False):
    _how = "iid" if _replacement else "without"
    for _name, _verify in (("sampled", sampled(_replacement)), ("traversal", traversal(_replacement))):
        WRONG[f"{_name}-one-number-{_how}"] = (with_one_number(_verify), TWO_CHAINS, _replacement)
        WRONG[f"{_name}-whole-bonus-{_how}"] = (with_bonus_from(_verify, as_it_is), PAIR, _replacement)
        WRONG[f"{_name}-unwarped-bonus-{_how}"] = (with_bonus_from(_verify, warmer), PAIR, _replacement)
    for _flag in ("residual_not_scaled", "parent_not_updated", "descendants_not_updated"):
        WRONG[f"traversal-{_flag}-{_how}"] = (
            traverse(**{"replacement": _replacement, _flag: True}),
            TWO_CHAINS,
            _replacement,
        )
WRONG["block-one-number"] = (with_one_number(verify_block), chain(2), True)
WRONG["block-whole-bonus"] = (with_bonus_from(verify_block, as_it_is), chain(2), True)
WRONG["block-unwarped-bonus"] = (with_bonus_from(verify_block, warmer), chain(2), True)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_fail_the_same_check(name: str) -> None:
    verify, shape, replacement = WRONG[name]
    target = toy(1)
    assert check(target, near(target, 101), shape, replacement, verify).distance(target) > 0.01


def duplicates_dropped(draft: Toy, shape: Shape) -> Trees:
    def drawing(generator: torch.Generator) -> DraftTree:
        return siblings(draft, list(dict.fromkeys(draw_tree(draft, shape, True, generator).tokens.tolist())))

    return all_trees(draft, drawing)


def pruned(draft: Toy, shape: Shape, kept: int) -> Trees:
    """The best of those drawn, in the order of drawing."""

    def drawing(generator: torch.Generator) -> DraftTree:
        tokens: list[int] = draw_tree(draft, shape, False, generator).tokens.tolist()
        best = sorted(tokens, key=lambda token: -float(draft.first[token]))[:kept]
        return siblings(draft, [token for token in tokens if token in best])

    return all_trees(draft, drawing)


def siblings(draft: Toy, tokens: list[int]) -> DraftTree:
    tree = tree_of(*((token,) for token in tokens))
    return replace(tree, draft_probs=draft.rows(tree))


# The two subtle mistakes, and the seeds of toys (of four tokens, two children) on which they do this much harm: total
# variation of not renormalising, and of dropping duplicates.
SUBTLE = {38: (0.0111, 0.0094), 48: (0.0382, 0.0287)}


@pytest.mark.parametrize("seed", SUBTLE)
def test_subtle_mistakes_fail_the_same_check(seed: int) -> None:
    target, draft = toy(seed, 4), toy(seed + 1000, 4)
    drawn = trees_of(draft, PAIR, False)
    unnormalised, dropped = SUBTLE[seed]
    for wrong in (
        token_by_token(replacement=False, draft_not_renormalised=True),
        traverse(replacement=False, draft_not_renormalised=True),
        sampled(True),
        traversal(True),
    ):
        assert exact(target, drawn, wrong, 1).distance(target) == pytest.approx(unnormalised, abs=1e-4)
    for verify in (sampled(True), traversal(True)):
        found = exact(target, duplicates_dropped(draft, PAIR), verify, 1)
        assert found.distance(target) == pytest.approx(dropped, abs=1e-4)


def test_gross_mistakes_fail_the_same_check() -> None:
    target = toy(1, 4)
    draft = near(target, 101)
    top = siblings(draft, draft.first.argsort(descending=True)[:2].tolist())
    for verify in (sampled(False), traversal(False)):
        assert exact(target, [(top, 1.0)], verify, 1).distance(target) > 0.1
        assert exact(target, pruned(draft, ((), (), ()), 2), verify, 1).distance(target) > 0.1
    assert exact(target, [(top, 1.0)], verify_deterministic, 1).distance(target) < 1e-12


# ---- real random numbers ---------------------------------------------------------------------------------------------

# A chi-square test at level 1e-4 on n draws from a wrong distribution has mean (cells - 1) + n * divergence and
# variance 2 (cells - 1) + 4 n * divergence. The wrong rule's statistic has to pass the level's threshold with all but
# 1e-4 (3.7 standard deviations). For four cells the threshold is 21.1, and n * divergence = 90 is enough; for nine
# cells 31.8, and 100. Hence the draws: a total variation of 0.01 has a divergence of at least 0.0004 and takes some
# 230,000 (slow); the 0.03 of the other toy takes 9,000.
LEVEL = 1e-4
ENOUGH = {4: 90.0, 9: 100.0}


@pytest.mark.parametrize(
    ("seed", "draws"), [(48, 9_000), pytest.param(38, 230_000, marks=pytest.mark.slow)], ids=["0.03", "0.01"]
)
def test_statistics_tell_right_from_subtly_wrong(seed: int, draws: int) -> None:
    target, draft = toy(seed, 4), toy(seed + 1000, 4)
    independent, without = (trees_of(draft, PAIR, replacement) for replacement in (True, False))
    dropped = duplicates_dropped(draft, PAIR)
    for trees, verify in ((independent, sampled(True)), (without, sampled(False))):
        assert p_value(target, trees, verify, draws, 1) > LEVEL
    for trees, verify in ((dropped, sampled(True)), (without, sampled(True))):
        assert exact(target, trees, verify, 1).divergence(target) * draws > ENOUGH[4]
        assert p_value(target, trees, verify, draws, 1) < LEVEL


@pytest.mark.parametrize(
    ("right", "wrong", "shape", "replacement"),
    [
        (verify_block, "block-residual-not-scaled", chain(2), True),
        (traversal(True), "traversal-residual_not_scaled-iid", TWO_CHAINS, True),
        (traversal(False), "traversal-one-number-without", TWO_CHAINS, False),
        (sampled(False), "sampled-one-number-without", TWO_CHAINS, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_statistics_of_the_first_two_tokens(right: Verify, wrong: str, shape: Shape, replacement: bool) -> None:
    draws, target = 5_500, toy(1)
    trees = trees_of(near(target, 101), shape, replacement)
    assert exact(target, trees, WRONG[wrong][0], 2).divergence(target) * draws > ENOUGH[9]
    assert p_value(target, trees, right, draws, 2) > LEVEL
    assert p_value(target, trees, WRONG[wrong][0], draws, 2) < LEVEL


# ---- edges -----------------------------------------------------------------------------------------------------------

ALL = [sampled(True), sampled(False), traversal(True), traversal(False), verify_block]


@pytest.mark.parametrize("verify", ALL)
def test_an_empty_tree_is_one_plain_draw(verify: Verify) -> None:
    rows = torch.tensor([[0.25, 0.75, 0.0]])
    assert outcomes(verify, DraftTree.empty(torch.device("cpu")), rows) == {((), 0): 0.25, ((), 1): 0.75}


@pytest.mark.parametrize("verify", ALL)
def test_a_chosen_tree_is_refused(verify: Verify) -> None:
    with pytest.raises(DecodeError, match="use verify_deterministic"):
        verify(tree_of((1,)), torch.full((2, 3), 1 / 3), torch.Generator())


@pytest.mark.parametrize("verify", ALL)
def test_shapes_must_fit(verify: Verify) -> None:
    tree = replace(tree_of((1,)), draft_probs=torch.full((2, 4), 1 / 4))
    with pytest.raises(DecodeError, match="draft_probs has shape"):
        verify(tree, torch.full((2, 3), 1 / 3), torch.Generator())
    with pytest.raises(DecodeError, match="target_probs has shape"):
        verify(tree, torch.full((1, 4), 1 / 4), torch.Generator())


@pytest.mark.parametrize("verify", ALL)
def test_a_token_that_the_draft_cannot_draw_is_refused(verify: Verify) -> None:
    tree = replace(tree_of((1,)), draft_probs=torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    with pytest.raises(DecodeError, match="node 0 holds a token"):
        verify(tree, torch.full((2, 3), 1 / 3), torch.Generator())


def test_repeated_siblings_cannot_be_drawn_without_replacement() -> None:
    tree = DraftTree(torch.tensor([0, 0]), torch.tensor([-1, -1]), draft_probs=torch.full((3, 2), 0.5))
    rows = torch.tensor([[0.0, 1.0]]).expand(3, 2)  # the first is rejected for certain
    for verify in (verify_sampled, verify_traversal):
        with pytest.raises(DecodeError, match="node 1 holds a token"):
            verify(tree, rows, torch.Generator(), replacement=False)
        assert verify(tree, rows, torch.Generator(), replacement=True) == Verified([], [], 1)


def test_block_verification_is_for_chains() -> None:
    tree = replace(tree_of((0,), (1,)), draft_probs=torch.full((3, 2), 0.5))
    with pytest.raises(DecodeError, match=r"parents of this tree are \[-1, -1\]"):
        verify_block(tree, torch.full((3, 2), 0.5), torch.Generator())


@given(name=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 1000), replacement=st.booleans())
@settings(deadline=None, max_examples=30)
def test_point_masses_are_lossless_for_drawn_trees_too(name: str, seed: int, replacement: bool) -> None:
    """Repeated siblings included."""
    target = toy(seed)
    tree = draw_tree(near(target, seed + 1), SHAPES[name], replacement, torch.Generator().manual_seed(seed))
    found = exact(target, [(tree, 1.0)], verify_deterministic, depth(SHAPES[name]) + 1)
    assert found.distance(target) < 1e-12
