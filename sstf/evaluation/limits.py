"""What bounds a result, to be read beside it: how much of the possible a head reaches, and where the time goes.

| limit | meaning |
|---|---|
| ceiling | speedup <= accepted length: a step emits so many tokens and costs at least one pass of the target |
| constant rate | (1 - a^(g + 1)) / (1 - a), arXiv 2211.17192, eq. 1: a chain of g whose tokens fare like the first |
| cost terms | accepted length / (draft + verify + host), each a share of a plain step, of the same run |
| vocabulary cap | a head proposes no token outside its draft vocabulary, so a <= E[target_probs(draft vocabulary)] |
| tree oracle | 1 + the sum of target_probs along the path, over the best nodes: a perfect drafter of that tree size |

The oracle is for sampling: a greedy target's path mass is 1 on one chain, which a perfect drafter follows to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.decode.passes import Passes
from sstf.evaluation.metrics import Record, acceptance_rate, accepted_length, survival, tokens_per_second
from sstf.targets import Target
from sstf.types import DraftTree
from sstf.warping import warp


@dataclass(frozen=True)
class Shape:
    """What an arm drafts at most: levels and nodes. `chain` where each level has one node."""

    depth: int
    nodes: int
    chain: bool


@dataclass(frozen=True)
class Limits:
    """Of one arm at one temperature. Costs are in plain steps; None where a limit does not apply."""

    arm: str
    temperature: float
    ceiling: float
    constant_rate: float | None
    draft_cost: float
    verify_cost: float
    host_cost: float
    speedup_if_drafting_were_free: float
    vocabulary_cap: float | None
    tree_oracle: float | None


def limits(
    arm: str,
    temperature: float,
    made: Sequence[Record],
    plain: Sequence[Record],
    shape: Shape,
    vocabulary_cap: float | None,
    tree_oracle: float | None,
) -> Limits | None:
    """Bounds of an arm from its records; None where nothing was verified."""
    passes = sum(len(r.accepted_lengths) for r in made)
    base = tokens_per_second(plain)
    if not passes or not base:
        return None
    tau = accepted_length(made)
    rate = acceptance_rate(survival(made, 1))[0]
    draft, verify, host = (
        base * sum(seconds) / passes
        for seconds in ([r.draft_s for r in made], [r.verify_s for r in made], [r.host_s for r in made])
    )
    return Limits(
        arm,
        temperature,
        ceiling=tau,
        constant_rate=None if rate is None or not shape.chain else constant_rate_length(rate, shape.depth),
        draft_cost=draft,
        verify_cost=verify,
        host_cost=host,
        speedup_if_drafting_were_free=tau / (verify + host),
        vocabulary_cap=vocabulary_cap,
        tree_oracle=tree_oracle,
    )


def constant_rate_length(rate: float, depth: int) -> float:
    """Expected accepted length of a chain whose every token is accepted with chance `rate`.

    >>> constant_rate_length(0.5, 2)
    1.75
    """
    return float(sum(rate**level for level in range(depth + 1)))


Growth = Generator[DraftTree, Float[Tensor, "rows vocab"], float]


def best_tree(depth: int, nodes: int, device: torch.device) -> Growth:
    """Grow the best tree: at most `nodes` nodes, the most probable paths of at most `depth`.

    A node never has more mass than its parent, so the best nodes form a tree, and what is not among the best when its
    level is grown never comes back: growing level by level is exact.

    Yields each tree whose distributions it needs: the target's behind the root (row 0) and behind every node. Returns
    the expected accepted length.

    Args:
        depth: levels.
        nodes: kept of all levels together.
        device: of the tree.
    """
    tokens: list[int] = []
    parents: list[int] = []
    mass: list[float] = []
    frontier = [-1]
    for _ in range(depth):
        tree = DraftTree(torch.tensor(tokens, dtype=torch.int64, device=device), torch.tensor(parents, device=device))
        if not tokens:
            tree = DraftTree.empty(device)
        probs = yield tree
        best, ids = probs[[node + 1 for node in frontier]].topk(min(nodes, probs.shape[-1]), dim=-1)
        old = len(tokens)
        for node, chances, children in zip(frontier, best.tolist(), ids.tolist(), strict=True):
            above = 1.0 if node < 0 else mass[node]
            for chance, child in zip(chances, children, strict=True):
                tokens.append(child)
                parents.append(node)
                mass.append(above * chance)
        # Stable: of equal mass, a parent comes before its child.
        kept = sorted(sorted(range(len(mass)), key=lambda i: -mass[i])[:nodes])
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        frontier = [place[node] for node in kept if node >= old and mass[node] > 0]
        tokens, mass = [tokens[node] for node in kept], [mass[node] for node in kept]
        parents = [place[parents[node]] for node in kept]
        if not frontier:
            break
    return 1 + sum(mass)


def grow_together(
    growths: Sequence[Growth], verify: Callable[[list[int], list[DraftTree]], Sequence[Float[Tensor, "rows vocab"]]]
) -> list[float]:
    """What each growth returns. All that still grow are verified in one call, which gets their numbers and trees."""
    waiting = {number: next(growth) for number, growth in enumerate(growths)}
    lengths = [0.0] * len(growths)
    while waiting:
        found = verify(list(waiting), list(waiting.values()))
        for number, probs in zip(list(waiting), found, strict=True):
            try:
                waiting[number] = growths[number].send(probs)
            except StopIteration as end:
                lengths[number] = end.value
                del waiting[number]
    return lengths


@torch.inference_mode()
def tree_oracles(
    target: Target,
    contexts: Sequence[Sequence[int]],
    shapes: Sequence[Shape],
    temperature: float,
    top_p: float,
) -> list[float] | None:
    """The oracle's mean accepted length over `contexts` (token ids, the last one not yet verified), for every shape.
    None where the target cannot see a tree."""
    if not target.takes_trees or not contexts:
        return None
    room = max(shape.nodes for shape in shapes) + 1
    passes = Passes(target, None, len(contexts), max(map(len, contexts)) + room)
    for slot, ids in enumerate(contexts):
        passes.prefill(slot, list(ids[:-1]))

    def verify(slots: list[int], trees: list[DraftTree]) -> list[Tensor]:
        past, roots = [len(contexts[slot]) - 1 for slot in slots], [contexts[slot][-1] for slot in slots]
        logits, _ = passes.verify(slots, past, roots, trees)
        return [warp(rows[: len(tree) + 1], temperature, top_p) for rows, tree in zip(logits, trees, strict=True)]

    means = []
    for shape in shapes:
        growths = [best_tree(shape.depth, shape.nodes, target.device) for _ in contexts]
        means.append(sum(grow_together(growths, verify)) / len(contexts))
    return means
