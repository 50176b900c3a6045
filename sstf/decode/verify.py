"""Verification of a draft tree: which of its tokens the target would have said. Torch alone.

Greedy: walk from the root to the child that equals the target's argmax; the argmax where no child does is the bonus
token. Sampling: candidates are the top of the draft distribution, a deterministic choice, so each child is a point
mass. Children are tried in order, x is accepted with probability target_probs[x]; a rejected x is removed
(target_probs[x] = 0, renormalised); when all are rejected the bonus token is drawn from what is left. The emitted
token then has exactly the target's distribution (SpecInfer, arXiv 2305.09781, for point-mass proposals).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.trees.topology import children
from sstf.types import DraftTree


@dataclass(frozen=True)
class Verified:
    """`nodes` are the accepted nodes from the root down; `bonus` follows the last of them."""

    nodes: list[int]
    tokens: list[int]
    bonus: int


def verify_greedy(tree: DraftTree, target_tokens: list[int]) -> Verified:
    """Args:
    tree: the proposal.
    target_tokens: the target's argmax at the root and then at each node, [node + 1].
    """
    tokens: list[int] = tree.tokens.tolist()
    below = children(tree.parents.tolist())
    path: list[int] = []
    node = -1
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
    """Args:
    tree: the proposal, chosen deterministically from the draft distribution; siblings have different tokens.
    target_probs: the warped target distribution at the root and then at each node, [node + 1, vocab].
    generator: on the CPU; one uniform number is drawn per child tried and one for the bonus token.
    """
    tokens: list[int] = tree.tokens.tolist()
    below = children(tree.parents.tolist())
    path: list[int] = []
    node = -1
    while True:
        probs = target_probs[node + 1].double()
        accepted = None
        for child in below.get(node, ()):
            # `probs` is kept unnormalised; its sum is what the rejected siblings left.
            chance = float(probs[tokens[child]] / probs.sum())
            if float(torch.rand((), generator=generator, dtype=torch.float64)) < chance:
                accepted = child
                break
            probs = probs.clone()
            probs[tokens[child]] = 0.0
        if accepted is None:
            return Verified(path, [tokens[i] for i in path], draw(probs, generator))
        path.append(accepted)
        node = accepted


def draw(probs: Float[Tensor, "vocab"], generator: torch.Generator) -> int:
    """One token by inverse transform from an unnormalised distribution, with one uniform number."""
    cumulative = probs.double().cumsum(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative.device) * cumulative[-1]
    # right: a token of probability 0 is never drawn, not even by the number 0.
    return min(int(torch.searchsorted(cumulative, uniform, right=True)), int(probs.nonzero()[-1]))
