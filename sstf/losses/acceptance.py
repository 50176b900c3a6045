"""Accepted length without decoding: what a chain would have accepted at every position of a text."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def accepted_drafts(hits: Bool[Tensor, "step row"]) -> Tensor:
    """Leading hits at each anchor: how many drafted tokens a greedy chain would have accepted there.

    Args:
        hits: [step, row], True where draft position `step` of the chain that starts at `row` equals the target's
            argmax. Later positions count only while all earlier ones hit.

    Returns:
        [row] int64, 0 .. steps.

    >>> accepted_drafts(torch.tensor([[True, True, False], [False, True, True]]))
    tensor([1, 2, 0])
    """
    return hits.long().cumprod(0).sum(0)
