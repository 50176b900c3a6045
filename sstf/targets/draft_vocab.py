"""The draft vocabulary: the target tokens that a head can propose, chosen by frequency."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor


def choose_draft_vocab(
    frequencies: Int[Tensor, "vocab"], size: int, always: Iterable[int] = ()
) -> Int[Tensor, "draft_vocab"]:
    """The `size` most frequent target ids, ascending; ties go to the smaller id, `always` is in whatever its count.

    A size of the target's vocabulary or above keeps every token.

    >>> choose_draft_vocab(torch.tensor([5, 0, 7, 1]), 2, always=[3])
    tensor([2, 3])
    """
    ranked = frequencies.clone()
    ranked[torch.tensor(sorted(always), dtype=torch.int64)] = torch.iinfo(torch.int64).max
    return ranked.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(frequencies: Int[Tensor, "vocab"], draft_tokens: Int[Tensor, "draft_vocab"]) -> float:
    """Share of the counted tokens that the draft vocabulary holds."""
    return float(frequencies[draft_tokens].sum() / frequencies.sum().clamp_min(1))
