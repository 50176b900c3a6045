"""How much to draft and in which shape, decided before drafting, and the growth of a tree from a draft distribution.

The dynamic tree is EAGLE-2's (arXiv 2406.16858): a node's score is the sum of log draft_probs along its path; each
level expands the `top_k` best of its candidates; of ALL candidates seen, the `total_tokens` best are verified. A
child never scores above its parent, so that choice is a connected tree. A chain is the same with one candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from sstf.config_loading import Section
from sstf.types import DraftTree


class Chain(Section):
    """One path of `depth` tokens."""

    kind: Literal["chain"] = "chain"
    depth: int = Field(default=4, ge=1, le=64)

    @property
    def top_k(self) -> int:
        """Candidates a node."""
        return 1

    @property
    def total_tokens(self) -> int:
        """Nodes verified."""
        return self.depth


class DynamicTree(Section):
    """EAGLE-2's tree: `depth` levels, `top_k` nodes expanded a level, `total_tokens` nodes verified."""

    kind: Literal["dynamic"] = "dynamic"
    depth: int = Field(default=5, ge=1, le=64)
    top_k: int = Field(default=8, ge=1, le=128)
    total_tokens: int = Field(default=24, ge=1, le=1024)


TreePolicy = Annotated[Chain | DynamicTree, Field(discriminator="kind")]

# (rows of the last level's expanded nodes, their tokens in draft ids) -> log draft_probs of their children
Expand = Callable[[Tensor, Tensor], Tensor]


def grow(
    policy: Chain | DynamicTree,
    root_log_probs: Float[Tensor, "draft_vocab"],
    expand: Expand,
    draft_tokens: Int[Tensor, "draft_vocab"],
) -> DraftTree:
    """Grow a tree.

    Args:
        policy: its shape.
        root_log_probs: log draft_probs of the first drafted token.
        expand: runs the head on one level. Gets `parents` [width] int64, the position of each node's parent among
            the nodes of the previous call (all 0 on the first call: the root), and `tokens` [width] int64 draft ids;
            returns [width, draft_vocab] log draft_probs of the next token.
        draft_tokens: target ids of the draft vocabulary.
    """
    each = min(policy.top_k, root_log_probs.shape[-1])  # candidates a node
    scores, tokens = root_log_probs.topk(each)
    parents = torch.full_like(tokens, -1)
    all_scores, all_tokens, all_parents = [scores], [tokens], [parents]
    beam = torch.arange(each, device=tokens.device)  # positions in this level of the nodes to expand
    beam_parents = torch.zeros_like(tokens)
    offset = 0  # node index of this level's first candidate
    for _ in range(1, policy.depth):
        log_probs = expand(beam_parents, tokens[beam])
        level, token = log_probs.topk(each, dim=-1)  # [width, each]
        parents = (offset + beam)[:, None].expand_as(token).flatten()
        offset += len(tokens)
        scores = (scores[beam][:, None] + level).flatten()
        tokens = token.flatten()
        all_scores.append(scores)
        all_tokens.append(tokens)
        all_parents.append(parents)
        beam = scores.topk(min(policy.top_k, len(scores))).indices.sort().values
        beam_parents = beam // each
    flat_scores = torch.cat(all_scores)
    # Stable, so that among equal scores the earlier node wins: a parent before its child.
    best = flat_scores.sort(descending=True, stable=True).indices[: policy.total_tokens].sort().values
    renumber = torch.full((len(flat_scores) + 1,), -1, dtype=torch.int64, device=best.device)
    renumber[best] = torch.arange(len(best), device=best.device)
    return DraftTree(draft_tokens[torch.cat(all_tokens)[best]], renumber[torch.cat(all_parents)[best]])
