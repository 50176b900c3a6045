"""The exact distribution of what a verification rule emits, without a single random draw.

Two enumerators. `exactly` replaces the two functions that rules take their randomness from, `uniform` and `draw`: a
number is decided only when it is compared with a chance, so each run of the rule yields one result with its exact
probability. `enumerate_rule` knows nothing of the rule: for given uniform numbers the result is piecewise constant in
the next one, and it finds the pieces by bisection, at about fifty runs a piece. It proves `draw`, and is the slow twin
of the other.

Where the tree is drawn at random, the drawing is enumerated as well: only over both is the output the target's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import pytest
import torch
from torch import Tensor

import sstf.decode.verify as rules
from sstf.decode import Verified
from sstf.types import DraftTree

Verify = Callable[[DraftTree, Tensor, torch.Generator], Verified]
Shape = tuple["Shape", ...]  # a node is the tuple of its children
Result = TypeVar("Result")

ALMOST_ONE = 1 - 2**-53
RESOLUTION = 2**-46  # of a threshold; the probabilities are exact to about this much


@dataclass
class Toy:
    """A target over a few tokens whose next-token distribution depends on the last two."""

    first: Tensor  # [vocab]
    second: Tensor  # [vocab, vocab]
    third: Tensor  # [vocab, vocab, vocab]

    @property
    def vocab(self) -> int:
        return len(self.first)

    def after(self, path: tuple[int, ...]) -> Tensor:
        return (self.first, self.second, self.third)[min(len(path), 2)][path[-2:]] if path else self.first

    def joint(self, length: int = 3) -> Tensor:
        """Distribution of the first `length` tokens."""
        joint = self.first
        for _ in range(length - 1):
            rows = torch.stack([self.after(path) for path in product(range(self.vocab), repeat=joint.ndim)])
            joint = joint[..., None] * rows.reshape(*joint.shape, self.vocab)
        return joint

    def rows(self, tree: DraftTree) -> Tensor:
        """Target distribution at the root and at each node."""
        return torch.stack([self.first, *(self.after(path) for path in node_paths(tree))])


def toy(seed: int, vocab: int = 3, zeros: bool = False) -> Toy:
    """Random and uneven; with `zeros`, about a third of the tokens are impossible (top-p leaves such rows)."""
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        raw = torch.rand(*shape, vocab, generator=generator, dtype=torch.float64) ** 2 + 0.01
        if zeros:
            raw *= torch.rand(raw.shape, generator=generator) > 0.35
            raw[..., int(torch.randint(vocab, (), generator=generator))] += 0.2
        return raw / raw.sum(-1, keepdim=True)

    return Toy(rows(), rows(vocab), rows(vocab, vocab))


def node_paths(tree: DraftTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def tree_of(*paths: tuple[int, ...]) -> DraftTree:
    """The tree with exactly these nodes, parents listed first."""
    where = {path: i for i, path in enumerate(paths)}
    parents = [where[path[:-1]] if len(path) > 1 else -1 for path in paths]
    return DraftTree(torch.tensor([path[-1] for path in paths]), torch.tensor(parents))


class _Drained(Exception):
    """The rule asked for a number that is not decided yet."""


@contextmanager
def _uniforms(numbers: list[float], rest: float | None) -> Iterator[None]:
    """`torch.rand` yields `numbers`, then `rest` for ever, or raises where `rest` is None."""
    left = iter(numbers)

    def rand(*size: object, dtype: torch.dtype = torch.float32, **options: object) -> Tensor:
        number = next(left, rest)
        if number is None:
            raise _Drained
        return torch.tensor(number, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield


def enumerate_rule(verify: Verify, tree: DraftTree, target_probs: Tensor) -> dict[tuple[tuple[int, ...], int], float]:
    """Probability of every (accepted nodes, bonus token)."""
    generator = torch.Generator()

    def result(numbers: list[float], rest: float | None) -> tuple[tuple[int, ...], int] | None:
        with _uniforms(numbers, rest):
            try:
                found = verify(tree, target_probs, generator)
            except _Drained:
                return None
        assert found.tokens == [int(tree.tokens[node]) for node in found.nodes]
        return tuple(found.nodes), found.bonus

    def pieces(before: list[float]) -> Iterator[tuple[float, float]]:
        """(a number of the piece, its width). With the largest numbers to follow, everything later is rejected, so
        the result tells accepting from rejecting, and one drawn token from another."""

        def signature(number: float) -> object:
            return result([*before, number], ALMOST_ONE)

        def split(low: float, at_low: object, high: float, at_high: object) -> Iterator[tuple[float, float]]:
            if at_low == at_high:
                return
            if high - low < RESOLUTION:
                yield low, high
                return
            middle = (low + high) / 2
            at_middle = signature(middle)
            yield from split(low, at_low, middle, at_middle)
            yield from split(middle, at_middle, high, at_high)

        start = 0.0
        for _, edge in split(0.0, signature(0.0), ALMOST_ONE, signature(ALMOST_ONE)):
            if edge - start > 2 * RESOLUTION:
                yield (start + edge) / 2, edge - start
            start = edge
        yield (start + 1) / 2, 1 - start

    outcomes: dict[tuple[tuple[int, ...], int], float] = {}

    def walk(before: list[float], weight: float) -> None:
        found = result(before, None)
        if found is not None:
            outcomes[found] = outcomes.get(found, 0.0) + weight
            return
        for number, width in pieces(before):
            walk([*before, number], weight * width)

    walk([], 1.0)
    return outcomes


class _Choices:
    """One run after another through all the ways that a random procedure can go, depth first."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.chances: list[list[float]] = []
        self.at = 0

    def take(self, chances: list[float]) -> int:
        """Which of the alternatives happens in this run."""
        if self.at == len(self.taken):
            assert all(chance >= 0 for chance in chances) and abs(math.fsum(chances) - 1) < 1e-12
            self.taken.append(next(i for i, chance in enumerate(chances) if chance > 0))
            self.chances.append(chances)
        self.at += 1
        return self.taken[self.at - 1]

    def weight(self) -> float:
        return math.prod(chances[i] for i, chances in zip(self.taken, self.chances, strict=True))

    def advance(self) -> bool:
        """Goes over to the next run; False after the last."""
        self.at = 0
        while self.taken:
            last, chances = self.taken.pop(), self.chances.pop()
            later = [i for i in range(last + 1, len(chances)) if chances[i] > 0]
            if later:
                self.taken.append(later[0])
                self.chances.append(chances)
                return True
        return False


class _Number:
    """A uniform number, of which only what comparisons have told is decided. It cannot be calculated with."""

    def __init__(self, choices: _Choices) -> None:
        self.choices, self.low, self.high = choices, 0.0, 1.0

    def __lt__(self, chance: float) -> bool:
        if chance <= self.low or chance >= self.high:
            return chance >= self.high
        share = (chance - self.low) / (self.high - self.low)
        below = self.choices.take([share, 1 - share]) == 0
        self.low, self.high = (self.low, chance) if below else (chance, self.high)
        return below

    def __ge__(self, chance: float) -> bool:
        return not self < chance


def exactly(procedure: Callable[[], Result]) -> dict[Result, float]:
    """Probability of every result of a procedure whose randomness comes from `rules.uniform` and `rules.draw`."""
    choices = _Choices()

    def draw(probs: Tensor, generator: torch.Generator) -> int:
        weights: list[float] = probs.double().tolist()
        total = math.fsum(weights)
        return choices.take([weight / total for weight in weights])

    found: dict[Result, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "uniform", lambda generator: _Number(choices))
        patch.setattr(rules, "draw", draw)
        while True:
            result = procedure()
            found[result] = found.get(result, 0.0) + choices.weight()
            if not choices.advance():
                return found


def outcomes(verify: Verify, tree: DraftTree, target_probs: Tensor) -> dict[tuple[tuple[int, ...], int], float]:
    """Probability of every (accepted nodes, bonus token)."""
    generator, tokens = torch.Generator(), tree.tokens.tolist()

    def run() -> tuple[tuple[int, ...], int]:
        found = verify(tree, target_probs, generator)
        assert found.tokens == [tokens[node] for node in found.nodes]
        return tuple(found.nodes), found.bonus

    return exactly(run)


# ---- trees that are drawn at random ----------------------------------------------------------------------------------


def chain(length: int) -> Shape:
    return (chain(length - 1),) if length else ()


def near(target: Toy, seed: int, share: float = 0.5, zeros: bool = False) -> Toy:
    """A draft model that is right to a certain share."""
    other = toy(seed, target.vocab, zeros)
    return Toy(*(share * a + (1 - share) * b for a, b in zip(_levels(target), _levels(other), strict=True)))


def _levels(toy: Toy) -> tuple[Tensor, Tensor, Tensor]:
    return toy.first, toy.second, toy.third


def draw_tree(draft: Toy, shape: Shape, replacement: bool, generator: torch.Generator) -> DraftTree:
    """A tree of this shape, smaller where a draft without replacement has no token left. Breadth first."""
    paths: list[tuple[int, ...]] = []
    parents: list[int] = []
    pending: deque[tuple[int, tuple[int, ...], Shape]] = deque([(-1, (), shape)])
    while pending:
        node, path, below = pending.popleft()
        row = draft.after(path)
        for child in below:
            if float(row.sum()) == 0:
                break
            token = rules.draw(row, generator)
            if not replacement:
                row = row.clone()
                row[token] = 0
            pending.append((len(paths), (*path, token), child))
            paths.append((*path, token))
            parents.append(node)
    return drawn_tree(draft, [path[-1] for path in paths], parents)


def drawn_tree(draft: Toy, tokens: list[int], parents: list[int]) -> DraftTree:
    tree = DraftTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64))
    return DraftTree(tree.tokens, tree.parents, draft_probs=draft.rows(tree))


Trees = list[tuple[DraftTree, float]]


def all_trees(draft: Toy, drawing: Callable[[torch.Generator], DraftTree]) -> Trees:
    """Every tree that can be drawn, with its probability."""
    generator = torch.Generator()

    def run() -> tuple[tuple[int, ...], tuple[int, ...]]:
        tree = drawing(generator)
        return tuple(tree.tokens.tolist()), tuple(tree.parents.tolist())

    found = exactly(run)
    return [(drawn_tree(draft, list(tokens), list(parents)), chance) for (tokens, parents), chance in found.items()]


def trees_of(draft: Toy, shape: Shape, replacement: bool) -> Trees:
    return all_trees(draft, lambda generator: draw_tree(draft, shape, replacement, generator))


@dataclass
class Exact:
    """What a rule does over all trees: `emitted` is the distribution of the first tokens, `accepted` the mean number
    of accepted nodes."""

    emitted: Tensor
    accepted: float

    def distance(self, target: Toy) -> float:
        """Total-variation distance between what is emitted and the target."""
        return float((self.emitted - target.joint(self.emitted.ndim)).abs().sum() / 2)

    def divergence(self, target: Toy) -> float:
        """Chi-square divergence from the target: what each draw adds to the mean of the chi-square statistic."""
        expected = target.joint(self.emitted.ndim)
        return float(((self.emitted - expected) ** 2 / expected.clamp_min(1e-300)).sum())


def exact(target: Toy, trees: Trees, verify: Verify, length: int = 3) -> Exact:
    """The first `length` tokens: those of one pass, then the target's own where it gave fewer."""
    joint = torch.zeros((target.vocab,) * length, dtype=torch.float64)
    accepted = 0.0
    for tree, weight in trees:
        prefixes: dict[tuple[int, ...], float] = {}
        tokens = tree.tokens.tolist()
        for (nodes, bonus), chance in outcomes(verify, tree, target.rows(tree)).items():
            prefix = (*(tokens[node] for node in nodes), bonus)[:length]
            prefixes[prefix] = prefixes.get(prefix, 0.0) + weight * chance
            accepted += weight * chance * len(nodes)
        for prefix, chance in prefixes.items():
            factors = torch.tensor(chance, dtype=torch.float64)
            for later in range(len(prefix), length):
                rests = product(range(target.vocab), repeat=later - len(prefix))
                rows = torch.stack([target.after((*prefix, *rest)) for rest in rests])
                factors = factors[..., None] * rows.reshape(*factors.shape, target.vocab)
            joint[prefix] += factors
    return Exact(joint, accepted)


def distance(target: Toy, tree: DraftTree, verify: Verify) -> float:
    """The same for one tree that was chosen, not drawn."""
    return exact(target, [(tree, 1.0)], verify).distance(target)


# ---- real random numbers ---------------------------------------------------------------------------------------------


def p_value(target: Toy, trees: Trees, verify: Verify, draws: int, length: int) -> float:
    """Of the chi-square test of the first `length` tokens of that many passes, each on a tree drawn anew, with real
    random numbers: what an enumeration cannot see."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([weight for _, weight in trees], dtype=torch.float64)
    # Grouped by tree: the passes are independent, so their order does not matter.
    times = torch.multinomial(weights, draws, replacement=True, generator=generator).bincount(minlength=len(trees))
    counts = torch.zeros((target.vocab,) * length, dtype=torch.float64)
    for (tree, _), count in zip(trees, times.tolist(), strict=True):
        rows = target.rows(tree)
        for _ in range(count):
            found = verify(tree, rows, generator)
            tokens = (*found.tokens, found.bonus)[:length]
            while len(tokens) < length:
                tokens = (*tokens, rules.draw(target.after(tokens), generator))
            counts[tokens] += 1
    expected = target.joint(length) * draws
    assert float(expected.min()) > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(expected.numel() - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
