"""The exact distribution of what a verification rule emits, found by driving its random numbers.

A rule asks for uniform numbers one after the other, and for a given beginning of them its result is piecewise constant
in the next. `enumerate_rule` finds the pieces by bisection and walks through all of them, so every result gets its
exact probability, without a single random draw and without knowing how the rule works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from sstf.decode import Verified
from sstf.types import DraftTree

Verify = Callable[[DraftTree, Tensor, torch.Generator], Verified]

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
        return (self.first, self.second, self.third)[len(path)][path] if path else self.first

    def joint(self) -> Tensor:
        """Distribution of the first three tokens."""
        return self.first[:, None, None] * self.second[:, :, None] * self.third

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


def emitted(target: Toy, tree: DraftTree, verify: Verify) -> Tensor:
    """Exact distribution of the first three tokens: those of one pass, then the target's own where it gave fewer."""
    joint = torch.zeros(target.vocab, target.vocab, target.vocab, dtype=torch.float64)
    for (nodes, bonus), chance in enumerate_rule(verify, tree, target.rows(tree)).items():
        tokens = (*(int(tree.tokens[node]) for node in nodes), bonus)[:3]
        later = torch.tensor(chance, dtype=torch.float64)
        for rest in product(range(target.vocab), repeat=3 - len(tokens)):
            path, factor = tokens, later
            for token in rest:
                factor = factor * target.after(path)[token]
                path = (*path, token)
            joint[path] += factor
    return joint


def distance(target: Toy, tree: DraftTree, verify: Verify) -> float:
    """Total-variation distance between what is emitted and the target."""
    return float((emitted(target, tree, verify) - target.joint()).abs().sum() / 2)
