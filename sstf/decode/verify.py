"""Verification of a draft tree: which of its tokens the target would have said. Torch alone.

Every rule but the greedy one emits tokens with exactly the target's distribution, whatever the draft. They differ in
what they assume of the tree, and in how much of it they accept:

| rule | the tree | paper |
|---|---|---|
| `verify_greedy` | any | |
| `verify_deterministic` | any; a candidate is right if it is the token drawn | as SpecInfer, arXiv 2305.09781 |
| `verify_sampled` | drawn from `tree.draft_probs`, decided token by token | SpecInfer, Algorithm 2 |
| `verify_block` | a drawn chain, decided as a whole | block verification, arXiv 2403.10444 |
| `verify_traversal` | drawn, decided from the leaves up | Traversal Verification, arXiv 2505.12398 |

A drawn tree must not be changed after the drawing on grounds of which tokens were drawn: children dropped for their
low probability, or duplicates merged, make the output wrong. How many children a node gets may depend on the
distributions and on the tokens above it.

Probabilities are compared in Python floats; distributions stay on the device of `target_probs`, one float64 row at a
time. The rules take their randomness from `uniform` and `draw` only, which is what the proofs in the tests enumerate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.errors import DecodeError
from sstf.trees.topology import children
from sstf.types import DraftTree

ROOT = -1


@dataclass(frozen=True)
class Verified:
    """`nodes` are the accepted nodes from the root down; `bonus` follows the last of them."""

    nodes: list[int]
    tokens: list[int]
    bonus: int


def verify_greedy(tree: DraftTree, target_tokens: list[int]) -> Verified:
    """Follows the child that equals the target's argmax; the argmax where no child does is the bonus token.

    Args:
        tree: the proposal.
        target_tokens: the target's argmax at the root and then at each node, [node + 1].
    """
    tokens: list[int] = tree.tokens.tolist()
    below = children(tree.parents.tolist())
    path: list[int] = []
    node = ROOT
    while True:
        wanted = target_tokens[node + 1]
        found = next((child for child in below.get(node, ()) if tokens[child] == wanted), None)
        if found is None:
            return Verified(path, [tokens[i] for i in path], wanted)
        path.append(found)
        node = found


def verify_deterministic(
    tree: DraftTree, target_probs: Float[Tensor, "rows vocab"], generator: torch.Generator
) -> Verified:
    """Draws the target's token at the root, follows the child that equals it and draws again there; the drawn token
    that no child equals is the bonus token.

    Lossless for any tree, drawn or chosen. Accepts some child of a node with the sum of their target_probs, which is
    what rejecting them one by one would (SpecInfer's rule, for candidates taken as point masses). Since every emitted
    token takes one number and nothing else does, the same numbers give the same text whatever was drafted.

    Args:
        tree: the proposal.
        target_probs: the warped target distribution at the root and then at each node, [node + 1, vocab].
        generator: on the CPU; one uniform number is drawn per emitted token.

    Raises:
        DecodeError: shapes that do not fit, or a distribution without mass.
    """
    _expect_rows(tree, target_probs)
    tokens: list[int] = tree.tokens.tolist()
    below = children(tree.parents.tolist())
    path: list[int] = []
    node = ROOT
    while True:
        drawn = draw(target_probs[node + 1], generator)
        found = next((child for child in below.get(node, ()) if tokens[child] == drawn), None)
        if found is None:
            return _verified(path, tokens, drawn)
        path.append(found)
        node = found


def verify_sampled(
    tree: DraftTree, target_probs: Float[Tensor, "rows vocab"], generator: torch.Generator, replacement: bool
) -> Verified:
    """Token by token from the root down: x is accepted with min(1, target_probs[x] / draft_probs[x]); after a
    rejection target_probs becomes norm(max(target_probs - draft_probs, 0)) and the next sibling is tried; the bonus
    token is drawn from what is left (SpecInfer, arXiv 2305.09781, Algorithm 2).

    Args:
        tree: the proposal, drawn from its `draft_probs`.
        target_probs: the warped target distribution at the root and then at each node, [node + 1, vocab].
        generator: on the CPU; one uniform number is drawn per child tried and one for the bonus token.
        replacement: True where siblings were drawn independently of each other, repeated tokens kept; False where
            each was drawn from `draft_probs` without the tokens of the earlier ones, renormalised.

    Raises:
        DecodeError: a tree without `draft_probs`, or with a token that they make impossible; shapes that do not fit;
            a distribution without mass.
    """
    draft_probs = _draft_probs(tree, target_probs)
    tokens, parents, (target_at, draft_at) = _at_nodes(tree, target_probs, draft_probs)
    below = children(parents)
    path: list[int] = []
    node = ROOT
    while True:
        siblings = below.get(node, [])
        accepted = None
        remainder: _Remainder | None = None
        for place, child in enumerate(siblings):
            if uniform(generator) < _ratio(1.0, target_at[child], draft_at[child], child):
                accepted = child
                break
            remainder = remainder or _Remainder(target_probs[node + 1].double(), _row(draft_probs, node, target_probs))
            mass = remainder.reject(1.0, tokens[child], replacement)
            if later := siblings[place + 1 :]:
                remainder.read(mass, later, tokens, target_at, draft_at)
        if accepted is None:
            row = target_probs[node + 1] if remainder is None else remainder.target
            return _verified(path, tokens, draw(row, generator))
        path.append(accepted)
        node = accepted


def verify_block(tree: DraftTree, target_probs: Float[Tensor, "rows vocab"], generator: torch.Generator) -> Verified:
    """Block verification of a drawn chain (arXiv 2403.10444, Algorithm 2): accepts at least as many tokens on average
    as `verify_sampled`.

    With token i of the chain drawn from row i - 1, p_0 = 1 and p_i = min(1, p_(i-1) * target_i / draft_i). The first
    i tokens are kept, for the largest i with u_i < h_i, where

        S_i = sum over x of max(p_i * target_probs[i, x] - draft_probs[i, x], 0)
        h_i = S_i / (S_i + 1 - p_i), and h_last = p_last

    and the bonus token is drawn from norm(max(p_i * target_probs[i] - draft_probs[i], 0)), or from the target's last
    row after the whole chain. Going from the last token back, the numbers u_i below the one found are never needed.

    Args:
        tree: a chain drawn from its `draft_probs`, possibly empty.
        target_probs: the warped target distribution at the root and then at each node, [node + 1, vocab].
        generator: on the CPU; one uniform number is drawn per token tried and one for the bonus token.

    Raises:
        DecodeError: a tree that is not a chain; otherwise as `verify_sampled`.
    """
    draft_probs = _draft_probs(tree, target_probs)
    tokens, parents, (target_at, draft_at) = _at_nodes(tree, target_probs, draft_probs)
    if parents != list(range(ROOT, len(tree) - 1)):
        raise DecodeError(
            f"block verification is for chains, and the parents of this tree are {parents}; "
            "draft one token a step, or use verify_traversal"
        )
    chances = [1.0]  # p_i
    for node in range(len(tree)):
        chances.append(_ratio(chances[-1], target_at[node], draft_at[node], node))
    kept, accept, row = len(tree), chances[-1], target_probs[-1]
    while kept > 0 and uniform(generator) >= accept:
        kept -= 1
        last = kept - 1  # the node that would be the last one accepted; its row is row `kept`
        remainder = _Remainder(target_probs[kept].double(), _row(draft_probs, last, target_probs))
        mass = remainder.reject(chances[kept], tokens[kept], replacement=True)
        row = remainder.target
        if kept > 0:  # the root needs no number
            accept = _kept_after_rejection(chances[kept], float(mass))
    return _verified(list(range(kept)), tokens, draw(row, generator))


def verify_traversal(
    tree: DraftTree, target_probs: Float[Tensor, "rows vocab"], generator: torch.Generator, replacement: bool
) -> Verified:
    """Traversal Verification of a drawn tree (arXiv 2505.12398): whole paths are decided, from the leaves
    up. On a chain it is block verification.

    Every node starts with chance[root] = 1 and chance[x] = min(1, chance[parent] * target_probs[x] / draft_probs[x]),
    distributions at its parent. The first leaf in depth-first order is accepted, with the path to it, with its
    chance. A rejected leaf is deleted, and for its parent

        residual = max(chance[parent] * target_probs - draft_probs, 0), S = its sum
        target_probs <- residual / S
        chance[parent] <- S / (S + 1 - chance[parent])
        draft_probs <- norm(draft_probs without the token), unless drawn with replacement

    The chances of its descendants follow, and the next leaf is tried, which is the parent once it has no child left.
    The bonus token is drawn from target_probs as they then are at the accepted node.

    Args:
        tree: the proposal, drawn from its `draft_probs`.
        target_probs: the warped target distribution at the root and then at each node, [node + 1, vocab].
        generator: on the CPU; one uniform number is drawn per leaf tried and one for the bonus token.
        replacement: as in `verify_sampled`.

    Raises:
        DecodeError: as `verify_sampled`.
    """
    draft_probs = _draft_probs(tree, target_probs)
    tokens, parents, (target_at, draft_at) = _at_nodes(tree, target_probs, draft_probs)
    below = children(parents)
    chances = {ROOT: 1.0}
    remainders: dict[int, _Remainder] = {}

    def refresh(node: int) -> None:
        """The chances of all descendants of `node`."""
        pending = [node]
        while pending:
            above = pending.pop()
            for child in below.get(above, ()):
                chances[child] = _ratio(chances[above], target_at[child], draft_at[child], child)
                pending.append(child)

    refresh(ROOT)
    while True:
        leaf, path = ROOT, []
        while below.get(leaf):
            leaf = below[leaf][0]
            path.append(leaf)
        if leaf == ROOT or uniform(generator) < chances[leaf]:
            row = remainders[leaf].target if leaf in remainders else target_probs[leaf + 1]
            return _verified(path, tokens, draw(row, generator))
        node = parents[leaf]
        below[node].pop(0)
        if node not in remainders:
            remainders[node] = _Remainder(target_probs[node + 1].double(), _row(draft_probs, node, target_probs))
        mass = remainders[node].reject(chances[node], tokens[leaf], replacement)
        left = remainders[node].read(mass, below[node], tokens, target_at, draft_at)
        chances[node] = _kept_after_rejection(chances[node], left)
        refresh(node)


def uniform(generator: torch.Generator) -> float:
    """A number in [0, 1); `uniform(generator) < chance` has probability `chance`, for 0 and 1 too."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def draw(probs: Float[Tensor, "vocab"], generator: torch.Generator) -> int:
    """One token by inverse transform from an unnormalised distribution, with one uniform number and one read.

    A token of probability 0 is never drawn.

    Raises:
        DecodeError: the distribution has no mass, or holds values that are not numbers.
    """
    cumulative = probs.double().cumsum(-1)
    possible = probs > 0
    # `possible` as well: a parallel cumsum rounds differently from one position to the next, and may rise at a 0.
    above = possible & (cumulative > uniform(generator) * cumulative[-1])
    # The product may round up to the total, which nothing is above: then the last possible token is meant.
    last = len(probs) - 1 - possible.flip(-1).int().argmax()
    token = torch.where(above.any(), above.int().argmax(), last)
    found = int(torch.where(cumulative[-1] > 0, token, -1))
    if found < 0:
        raise DecodeError("the distribution to draw a token from has no mass; check the logits for NaN")
    return found


@dataclass
class _Remainder:
    """What is left at one node after rejections: `target`, normalised, is what must still be emitted; `draft` is what
    the next sibling was drawn from. Both float64 [vocab]."""

    target: Tensor
    draft: Tensor

    def reject(self, chance: float, token: int, replacement: bool) -> Tensor:
        """Takes out what the rejected sibling stood for; returns the mass S, a scalar on the device."""
        residual = (chance * self.target - self.draft).clamp_min(0)
        mass = residual.sum()
        # S = 0: target and draft agree, so only rounding rejected. The target then stays, rather than 0 / 0.
        self.target = torch.where(mass > 0, residual / mass, self.target)
        if not replacement:
            self.draft = self.draft.index_fill(-1, torch.tensor(token, device=self.draft.device), 0)
            # Without mass nothing can be drawn any more: zeros then, rather than NaN.
            self.draft = self.draft / self.draft.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return mass

    def read(
        self, mass: Tensor, nodes: Sequence[int], tokens: list[int], target_at: list[float], draft_at: list[float]
    ) -> float:
        """Updates the probabilities of the siblings `nodes` in place; returns `mass`. One read."""
        where = torch.tensor([tokens[node] for node in nodes], dtype=torch.int64, device=self.target.device)
        found: list[float] = torch.cat([mass[None], self.target[where], self.draft[where]]).tolist()
        for i, node in enumerate(nodes):
            target_at[node], draft_at[node] = found[1 + i], found[1 + len(nodes) + i]
        return found[0]


def _ratio(chance: float, target: float, draft: float, node: int) -> float:
    """min(1, chance * target / draft)."""
    if draft <= 0:
        raise DecodeError(
            f"node {node} holds a token that draft_probs, less its earlier siblings where drawn without replacement, "
            "gives no probability; a drawn tree needs the very distributions that it was drawn from"
        )
    return min(1.0, chance * target / draft)


def _kept_after_rejection(chance: float, mass: float) -> float:
    """S / (S + 1 - p): the chance that a node is still accepted when what came below it was not."""
    # Parentheses: 1 swallows a small mass, and chance = 1 would then divide by 0.
    return mass / (mass + (1 - chance)) if mass > 0 else 0.0


def _verified(path: list[int], tokens: list[int], bonus: int) -> Verified:
    return Verified(path, [tokens[node] for node in path], bonus)


def _row(draft_probs: Tensor, node: int, target_probs: Tensor) -> Tensor:
    return draft_probs[node + 1].to(target_probs.device, torch.float64)


def _at_nodes(tree: DraftTree, *distributions: Tensor) -> tuple[list[int], list[int], list[list[float]]]:
    """Tokens, parents, and from each of the [node + 1, vocab] `distributions` the probability of every node's token at
    its parent. One read, in float64, which holds token ids exactly."""
    device = distributions[0].device
    columns = [tree.tokens, tree.parents, *(rows[tree.parents + 1, tree.tokens] for rows in distributions)]
    tokens, parents, *probs = torch.stack([column.to(device, torch.float64) for column in columns]).tolist()
    return [int(token) for token in tokens], [int(parent) for parent in parents], probs


def _expect_rows(tree: DraftTree, target_probs: Tensor) -> None:
    if target_probs.ndim != 2 or len(target_probs) != len(tree) + 1:
        raise DecodeError(
            f"target_probs has shape {list(target_probs.shape)}; expected a row for the root and for each of the "
            f"{len(tree)} nodes"
        )


def _draft_probs(tree: DraftTree, target_probs: Tensor) -> Tensor:
    """What the tree was drawn from. A tree without nodes needs none; its rows are never read."""
    _expect_rows(tree, target_probs)
    if len(tree) == 0:
        return target_probs
    if tree.draft_probs is None:
        raise DecodeError(
            "the tree has no draft_probs, so its nodes were chosen, not drawn; use verify_deterministic, or draw the "
            "tree from the draft distribution"
        )
    if tree.draft_probs.shape != target_probs.shape:
        raise DecodeError(
            f"draft_probs has shape {list(tree.draft_probs.shape)}; expected that of target_probs, "
            f"{list(target_probs.shape)}"
        )
    return tree.draft_probs
