"""The draft vocabulary: the target tokens that a head can propose, chosen by a score of each token."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def choose_draft_vocab(
    scores: Shaped[Tensor, "vocab"], size: int, then: Shaped[Tensor, "vocab"] | None = None
) -> Int[Tensor, "draft_vocab"]:
    """The `size` target ids with the highest scores, ascending; ties go to the higher `then`, and to the smaller id.

    A size of the target's vocabulary or above keeps every token.

    >>> choose_draft_vocab(torch.tensor([5, 0, 7, 1]), 2)
    tensor([0, 2])
    """
    order = torch.arange(len(scores))
    for key in (then, scores):  # stable: sorted by the last key first
        if key is not None:
            order = order[key[order].sort(descending=True, stable=True).indices]
    return order[:size].sort().values


def coverage(scores: Shaped[Tensor, "vocab"], draft_tokens: Int[Tensor, "draft_vocab"]) -> float:
    """Share of all scores (counts, or probability mass) that the draft vocabulary holds."""
    total = float(scores.sum())
    return float(scores[draft_tokens].sum()) / total if total else 0.0
