"""Growing draft trees from a draft distribution, for a batch of sequences at once.

A node's score is the sum of log draft_probs along its path (EAGLE-2, arXiv 2406.16858). The dynamic tree expands the
`top_k` best of each level and keeps the `total_tokens` best of ALL nodes seen; a child never scores above its parent,
so that choice is a connected tree.

With `top` the tree is a function of the text and of past passes alone, so every node is a point mass for verification.
Drawn nodes are kept whatever they turn out to be: dropping some by their value would bias the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sstf.trees.calibration import PathCalibration
from sstf.trees.policies import AnyTree, Chain, CostAwareTree, DynamicTree, StaticTree
from sstf.trees.topology import prune
from sstf.types import DraftTree
from sstf.warping import warp

# (positions of the new nodes' parents among the nodes of the previous call, their tokens in draft ids), both
# [batch, width] -> draft logits of their children [batch, width, draft_vocab]
Expand = Callable[[Tensor, Tensor], Tensor]


class StepCost(Protocol):
    """What a step costs on this machine."""

    def best_size(self, gains: Sequence[float], depth: int) -> int:
        """How many nodes, best first, promise most tokens a second."""

    def worth_another_level(
        self, gains: Sequence[float], frontier: Sequence[float], depth: int, keep: float = 1.0
    ) -> bool:
        """Whether drafting one level below `frontier` may raise the tokens per second."""


@dataclass(frozen=True)
class Drawing:
    """How children are drawn at temperature > 0: from the draft distribution, warped like the target's."""

    temperature: float
    top_p: float
    top_k: int
    generators: Sequence[torch.Generator]  # one a sequence, on the CPU
    vocab_size: int  # of the target, whose ids `draft_probs` is over


@dataclass(frozen=True)
class DraftContext:
    """What drafting may consult beside the text: limits, and what past passes taught. Never the tokens drawn."""

    depth: int  # the deepest node that could still be emitted
    drawing: Drawing | None = None  # None: temperature 0
    calibration: PathCalibration | None = None
    cost: StepCost | None = None


def grow(
    policy: AnyTree,
    context: DraftContext,
    root_logits: Float[Tensor, "batch draft_vocab"],
    expand: Expand,
    draft_tokens: Int[Tensor, "draft_vocab"],
    threshold: float = 0.0,
) -> list[DraftTree]:
    """Grow one tree a sequence.

    Args:
        policy: its shape.
        context: limits and experience.
        root_logits: draft logits of the first drafted token.
        expand: runs the head on one level. Its first call's parents are all 0: the root.
        draft_tokens: target ids of the draft vocabulary.
        threshold: a node whose best child would have a smaller draft probability gets none (Kangaroo, arXiv
            2404.18911), and drafting stops where that holds for all. It is decided before its children are drawn.
    """
    if isinstance(policy, Chain | StaticTree):
        if context.drawing and policy.draw != "top":
            return _drawn(policy, context, context.drawing, root_logits, expand, draft_tokens, threshold)
        return _static(policy, context, root_logits, expand, draft_tokens, threshold)
    return _dynamic(policy, context, root_logits, expand, draft_tokens, threshold)


def _best(logits: Float[Tensor, "batch width draft_vocab"], count: int) -> tuple[Tensor, Tensor]:
    """log draft_probs and draft ids of the `count` best tokens, [batch, width, count]."""
    values, ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return values.float() - logits.float().logsumexp(-1, keepdim=True), ids


# ---- the best nodes --------------------------------------------------------------------------------------------------


def _dynamic(
    policy: DynamicTree | CostAwareTree,
    context: DraftContext,
    root_logits: Tensor,
    expand: Expand,
    draft_tokens: Tensor,
    threshold: float,
) -> list[DraftTree]:
    calibration = context.calibration if policy.calibrated else None
    depth, top_k = min(policy.depth, context.depth), policy.top_k
    batch, device = root_logits.shape[0], root_logits.device
    levels: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # scores, draft ids, parents, confidences: [batch, nodes]
    logits = root_logits[:, None]
    scores = torch.zeros(batch, 1, device=device)  # of the nodes being expanded
    above = torch.full((batch, 1), -1, device=device)  # their node numbers
    offset = 0
    for level in range(1, depth + 1):
        log_probs, ids = _best(logits, top_k)
        each = ids.shape[-1]
        confidence = log_probs.exp()
        if calibration is not None:
            log_probs = calibration.probabilities(confidence, level).log()
        if threshold:
            log_probs = log_probs.masked_fill(confidence[..., :1] < threshold, -math.inf)
        scores = (scores[..., None] + log_probs).flatten(1)
        tokens = ids.flatten(1)
        levels.append((scores, tokens, above.repeat_interleave(each, 1), confidence.flatten(1)))
        if level == depth or _enough(policy, context, levels, log_probs):
            break
        width = int((scores != -math.inf).sum(1).max()) if threshold else scores.shape[1]
        if not width:
            break
        beam = scores.topk(min(top_k, width), dim=1).indices.sort(1).values
        parents = beam // each if level > 1 else torch.zeros_like(beam)
        above = beam + offset
        offset += tokens.shape[1]
        scores, tokens = scores.gather(1, beam), tokens.gather(1, beam)
        logits = expand(parents, tokens)
    scores, tokens, parents, confidence = (torch.cat([part[i] for part in levels], 1) for i in range(4))
    size = min(policy.total_tokens, scores.shape[1])
    # Stable, so that among equal scores the earlier node wins: a parent before its child.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    if isinstance(policy, CostAwareTree) and context.cost is not None:
        gains = scores.exp().gather(1, order)[:, :size].mean(0).tolist()
        # NaN has no best size; one node shows it to whoever checks the confidences.
        size = 1 if math.isnan(gains[0]) else context.cost.best_size(gains, len(levels))
    best = order[:, :size].sort(1).values
    number = torch.full((batch, scores.shape[1] + 1), -1, dtype=torch.int64, device=device)
    number.scatter_(1, best, torch.arange(size, device=device).expand(batch, -1))
    parents = number.gather(1, parents.gather(1, best) % number.shape[1])  # the root, -1, reads the last column
    tokens, confidence = draft_tokens[tokens.gather(1, best)], confidence.gather(1, best)
    # Experience may put a later sibling before an earlier one, which is then left out. Levels are multiples of `each`.
    ranks = best % each
    trees = [DraftTree(tokens[row], parents[row], confidence[row], ranks=ranks[row]) for row in range(batch)]
    return _pruned(trees, scores.gather(1, best) != -math.inf) if threshold else trees


def _enough(
    policy: DynamicTree | CostAwareTree, context: DraftContext, levels: Sequence[tuple[Tensor, ...]], log_probs: Tensor
) -> bool:
    """Whether a cost-aware tree had better stop here."""
    if not isinstance(policy, CostAwareTree) or context.cost is None:
        return False
    seen = torch.cat([part[0] for part in levels], 1).exp().mean(0).sort(descending=True).values
    last = levels[-1][0].exp()
    frontier = last.topk(min(policy.top_k, last.shape[1]), dim=1).values.mean(0)
    keep = float(log_probs[..., 0].exp().mean())  # of this level; the next is taken to be like it
    gains = seen[: policy.total_tokens].tolist()
    return not context.cost.worth_another_level(gains, frontier.tolist(), len(levels), max(keep, 1e-6))


# ---- always the same nodes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """One level of a static tree: nodes are numbered from `first` on."""

    first: int
    each: int  # candidates a parent
    pick: list[int]  # of the parents' candidates, flattened: the nodes
    parents: list[int]  # node numbers
    inner: list[int]  # of this level's nodes, those that have children
    above: list[int]  # for each inner node, its parent's place among the inner nodes one level up


@lru_cache(maxsize=256)
def _schedule(paths: tuple[tuple[int, ...], ...], depth: int) -> list[_Level]:
    paths = tuple(path for path in paths if len(path) <= depth)
    number = {path: node for node, path in enumerate(paths)}
    levels: list[_Level] = []
    expanded: list[tuple[int, ...]] = [()]
    for length in range(1, max(len(path) for path in paths) + 1):
        nodes = [path for path in paths if len(path) == length]
        each = 1 + max(path[-1] for path in nodes)
        place = {path: i for i, path in enumerate(expanded)}
        inner = [path for path in nodes if (*path, 0) in number]
        levels.append(
            _Level(
                first=number[nodes[0]],
                each=each,
                pick=[place[path[:-1]] * each + path[-1] for path in nodes],
                parents=[number.get(path[:-1], -1) for path in nodes],
                inner=[nodes.index(path) for path in inner],
                above=[place[path[:-1]] for path in inner],
            )
        )
        expanded = inner
    return levels


def _static(
    policy: Chain | StaticTree,
    context: DraftContext,
    root_logits: Tensor,
    expand: Expand,
    draft_tokens: Tensor,
    threshold: float,
) -> list[DraftTree]:
    batch, device = root_logits.shape[0], root_logits.device
    tokens: list[Tensor] = []
    confidences: list[Tensor] = []
    parents: list[int] = []
    missing: list[bool] = []
    doubt = _Doubt(threshold, batch, device)
    logits = root_logits[:, None]
    for level in _schedule(policy.paths, context.depth):
        log_probs, ids = _best(logits, level.each)
        if doubt.ends(log_probs[..., 0].exp(), level):
            break
        ids, log_probs, lost = _take(ids, log_probs, level)
        missing += lost
        parents += level.parents
        tokens.append(ids)
        confidences.append(log_probs.exp())
        if level.inner:
            inner = ids if len(level.inner) == ids.shape[1] else ids[:, level.inner]
            logits = expand(torch.tensor([level.above], device=device).expand(batch, -1), inner)
    if not tokens:
        return [DraftTree.empty(device)] * batch
    targets, confidence = draft_tokens[torch.cat(tokens, 1)], torch.cat(confidences, 1)
    above = torch.tensor(parents, device=device)
    trees = [DraftTree(targets[row], above, confidence[row]) for row in range(batch)]
    possible = doubt.kept(trees)
    if any(missing):
        possible &= ~torch.tensor(missing, device=device)
    return _pruned(trees, possible) if threshold or any(missing) else trees


class _Doubt:
    """Which nodes of a static shape nobody dared to draft: those below a node that `grow`'s threshold closed."""

    def __init__(self, threshold: float, batch: int, device: torch.device) -> None:
        self.threshold = threshold
        self.open = torch.ones(batch, 1, dtype=torch.bool, device=device)  # the nodes whose children come next
        self.levels: list[Tensor] = []  # [batch, nodes] bool, which of a level are there

    def ends(self, best: Tensor, level: _Level) -> bool:
        """Take in the best draft probabilities [batch, width] at the nodes to expand; whether none is left open."""
        if not self.threshold:
            return False
        self.open = self.open & ~(best < self.threshold)  # (NaN stays open, for whoever checks.)
        if not bool(self.open.any()):
            return True
        there = self.open[:, [pick // level.each for pick in level.pick]]
        self.levels.append(there)
        self.open = there[:, level.inner]
        return False

    def kept(self, trees: Sequence[DraftTree]) -> Tensor:
        """[batch, node] bool."""
        if self.threshold:
            return torch.cat(self.levels, 1)
        return torch.ones(len(trees), len(trees[0]), dtype=torch.bool, device=self.open.device)


def _pruned(trees: Sequence[DraftTree], there: Tensor) -> list[DraftTree]:
    """Without the nodes where `there` [batch, node] is False."""
    if bool(there.all()):
        return list(trees)
    return [prune(tree, keep) for tree, keep in zip(trees, there.tolist(), strict=True)]


def _take(ids: Tensor, values: Tensor, level: _Level) -> tuple[Tensor, Tensor, list[bool]]:
    """The level's nodes among the candidates; a rank that the draft vocabulary is too small for is missing."""
    had = ids.shape[-1]
    flat_ids, flat_values = ids.flatten(1), values.flatten(1)
    if had == level.each:
        if level.pick == list(range(flat_ids.shape[1])):
            return flat_ids, flat_values, [False] * len(level.pick)
        return flat_ids[:, level.pick], flat_values[:, level.pick], [False] * len(level.pick)
    lost = [pick % level.each >= had for pick in level.pick]
    pick = [pick // level.each * had + min(pick % level.each, had - 1) for pick in level.pick]
    return flat_ids[:, pick], flat_values[:, pick], lost


def _drawn(
    policy: Chain | StaticTree,
    context: DraftContext,
    drawing: Drawing,
    root_logits: Tensor,
    expand: Expand,
    draft_tokens: Tensor,
    threshold: float,
) -> list[DraftTree]:
    """The static shape, with children drawn from the draft distribution in place of its best tokens."""
    batch, device = root_logits.shape[0], root_logits.device
    vocab = drawing.vocab_size
    tokens: list[Tensor] = []
    confidences: list[Tensor] = []
    parents: list[int] = []
    missing: list[bool] = []
    schedule = _schedule(policy.paths, context.depth)
    nodes = schedule[-1].first + len(schedule[-1].pick)
    rows = torch.zeros(batch, nodes + 1, vocab, device=device)
    sources = [0]  # rows of the nodes whose children are drawn
    doubt = _Doubt(threshold, batch, device)
    logits = root_logits[:, None]
    for level in schedule:
        if doubt.ends(_best(logits, 1)[0][..., 0].exp(), level):  # before anything is drawn
            break
        probs = warp(logits, drawing.temperature, drawing.top_p, drawing.top_k)  # [batch, width, draft_vocab]
        rows[:, sources] = torch.zeros(batch, len(sources), vocab, device=device).index_copy_(2, draft_tokens, probs)
        ids = _draw_children(probs, level.each, policy.draw == "iid", drawing.generators)
        chosen, chance, lost = _take(ids, probs.gather(-1, ids), level)
        missing += lost
        parents += level.parents
        tokens.append(chosen)
        confidences.append(chance)
        if level.inner:
            sources = [level.first + node + 1 for node in level.inner]
            logits = expand(torch.tensor([level.above], device=device).expand(batch, -1), chosen[:, level.inner])
    if not tokens:
        return [DraftTree.empty(device)] * batch
    targets, confidence = draft_tokens[torch.cat(tokens, 1)], torch.cat(confidences, 1)
    above = torch.tensor(parents, device=device)
    rows = rows[:, : len(parents) + 1]  # drafting may have stopped early
    trees = [DraftTree(targets[row], above, confidence[row], rows[row]) for row in range(batch)]
    # Fewer tokens possible than children asked for: the rest were never drawn. (NaN stays, for whoever checks.)
    possible = doubt.kept(trees) & ~(confidence <= 0)
    if any(missing):
        possible &= ~torch.tensor(missing, device=device)
    return _pruned(trees, possible)


def _draw_children(probs: Tensor, count: int, iid: bool, generators: Sequence[torch.Generator]) -> Tensor:
    """[batch, width, count] draft ids in the order of drawing.

    Without replacement by the Gumbel trick: the `count` greatest of log p + Gumbel noise are draws one after the
    other, each from what the earlier ones left (Kool et al., arXiv 1903.06059).
    """
    drawn = []
    for row, generator in zip(probs, generators, strict=True):
        if iid:
            cumulative = row.double().cumsum(-1)
            uniform = torch.rand(len(row), count, generator=generator, dtype=torch.float64).to(row.device)
            found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            last = row.shape[-1] - 1 - (row > 0).flip(-1).float().argmax(-1, keepdim=True)
            drawn.append(found.minimum(last))
        else:
            uniform = torch.rand(row.shape, generator=generator, dtype=torch.float64).to(row.device)
            noise = -(-uniform.clamp_min(1e-300).log()).log()
            drawn.append((row.double().log() + noise).topk(min(count, row.shape[-1]), dim=-1).indices)
    return torch.stack(drawn)
