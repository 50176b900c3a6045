"""The choice: the draft that promises most tokens a second, for every batch size and context length.

    speedup = accepted_length · plain_step / (depth · draft_s + verify(nodes + 1) + host_s)

Accepted lengths of all shapes come from two probes, a deep chain and a large tree: a smaller tree is the best nodes of
the large one, and accepts as many of its tokens as lie on the path that was accepted. The seconds are measured at each
batch size and context length (`decode/cost.py`). Drafting a level is measured in a chain, so trees look a little
cheaper than they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sstf.decode import CostModel
from sstf.trees import children
from sstf.types import DraftTree

WIDTHS = (2, 4, 8)
NODES = (3, 5, 7, 11, 15, 23, 31, 47, 63)  # one less than what a verify pass is measured for, or between


@dataclass(frozen=True)
class Shape:
    """A draft: `nodes` of a tree of `depth` levels, of each node at most `width` children. A chain has width 1;
    depth 0 is plain decoding."""

    depth: int
    width: int
    nodes: int


PLAIN = Shape(0, 0, 0)


@dataclass(frozen=True)
class SeenTree:
    """One pass of the tree probe: of every node its depth (from 1), its rank among the siblings, and the product of
    the confidences along its path; and the nodes that were accepted, in order."""

    depths: list[int]
    ranks: list[int]
    scores: list[float]
    accepted: list[int]

    @staticmethod
    def of(tree: DraftTree, emitted: Sequence[int]) -> SeenTree:
        """From a drafted tree (with confidences) and what its pass emitted."""
        assert tree.confidence is not None
        tokens, parents, confidence = tree.tokens.tolist(), tree.parents.tolist(), tree.confidence.tolist()
        below = children(parents)
        depths, ranks, scores = [0] * len(tokens), [0] * len(tokens), [0.0] * len(tokens)
        for siblings in below.values():
            for rank, node in enumerate(siblings):
                ranks[node] = rank
        for node, parent in enumerate(parents):  # parents come first
            depths[node] = 1 + (depths[parent] if parent >= 0 else 0)
            scores[node] = confidence[node] * (scores[parent] if parent >= 0 else 1.0)
        accepted: list[int] = []
        for token in emitted:
            here = below.get(accepted[-1] if accepted else -1, ())
            right = next((node for node in here if tokens[node] == token), None)
            if right is None:
                break
            accepted.append(right)
        return SeenTree(depths, ranks, scores, accepted)

    def accepts(self, shape: Shape) -> int:
        """Accepted tokens of the sub-tree of this shape."""
        inside = [n for n, (d, r) in enumerate(zip(self.depths, self.ranks, strict=True)) if self._fits(d, r, shape)]
        # Of equal scores the earlier: a parent before its child.
        kept = set(sorted(inside, key=lambda node: -self.scores[node])[: shape.nodes])
        count = 0
        for node in self.accepted:
            if node not in kept:
                break
            count += 1
        return count

    @staticmethod
    def _fits(depth: int, rank: int, shape: Shape) -> bool:
        return depth <= shape.depth and rank < shape.width


@dataclass(frozen=True)
class Measured:
    """What the choice rests on: accepted length of every shape, and costs by (batch, context)."""

    accepted_lengths: dict[Shape, float]
    costs: dict[tuple[int, int], CostModel]


@dataclass(frozen=True)
class Choice:
    """The best shape at a batch size and context length; plain decoding where nothing is faster."""

    batch: int
    context: int
    shape: Shape
    accepted_length: float
    speedup: float


@dataclass(frozen=True)
class TunePlan:
    """The choices for engines that draft chains, and for those that draft trees; one shape for all batch sizes each;
    and for each context length the largest measured batch at which drafting is not slower (0: at none)."""

    chains: list[Choice]
    trees: list[Choice]
    one_chain: Shape
    one_tree: Shape
    break_even: dict[int, int]


def accepted_lengths(survival: Sequence[float], seen: Sequence[SeenTree]) -> dict[Shape, float]:
    """Of every chain up to the probe's depth and of the trees in `WIDTHS` and `NODES`.

    Args:
        survival: of the chain probe: share of passes that accepted position i.
        seen: passes of the tree probe.
    """
    found = {PLAIN: 1.0}
    for depth in range(1, len(survival) + 1):
        found[Shape(depth, 1, depth)] = 1 + sum(survival[:depth])
    deepest = max((max(one.depths, default=0) for one in seen), default=0)
    for depth in range(2, deepest + 1):
        for width in WIDTHS:
            for nodes in NODES:
                shape = Shape(depth, width, nodes)
                if nodes > depth:
                    found[shape] = 1 + sum(one.accepts(shape) for one in seen) / len(seen)
    return found


def plan(measured: Measured) -> TunePlan:
    """Choose."""
    chains = {shape: tau for shape, tau in measured.accepted_lengths.items() if shape.width <= 1}
    trees = measured.accepted_lengths
    chosen = [_best(batch, context, cost, chains) for (batch, context), cost in measured.costs.items()]
    grown = [_best(batch, context, cost, trees) for (batch, context), cost in measured.costs.items()]
    break_even = {}
    for context in dict.fromkeys(context for _, context in measured.costs):
        pays = [one.batch for one in grown if one.context == context and one.shape != PLAIN]
        break_even[context] = max(pays, default=0)
    return TunePlan(chosen, grown, _one_for_all(measured, chains), _one_for_all(measured, trees), break_even)


def _best(batch: int, context: int, cost: CostModel, lengths: Mapping[Shape, float]) -> Choice:
    """Of equals the smallest."""
    speedups = {shape: speedup(cost, shape, tau) for shape, tau in lengths.items()}
    shape = min(speedups, key=lambda s: (-speedups[s], s.nodes, s.depth))
    return Choice(batch, context, shape, lengths[shape], speedups[shape])


def speedup(cost: CostModel, shape: Shape, accepted_length: float) -> float:
    """Over plain decoding, which is exactly 1."""
    return 1.0 if shape == PLAIN else cost.speedup(accepted_length, shape.depth, shape.nodes)


def _one_for_all(measured: Measured, lengths: Mapping[Shape, float]) -> Shape:
    """The shape with the greatest geometric mean of the speedups."""

    def mean(shape: Shape) -> float:
        return sum(math.log(speedup(cost, shape, lengths[shape])) for cost in measured.costs.values())

    return min(lengths, key=lambda shape: (-mean(shape), shape.nodes, shape.depth))
