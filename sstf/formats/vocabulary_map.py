"""Draft vocabularies of published heads: `d2t` has offsets (target id less draft id), `t2d` marks those target ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sstf.errors import HeadError

MAPS = ("d2t", "t2d")


def in_order(
    tensors: Mapping[str, Tensor], size: int, vocabulary: int, by_draft_token: Sequence[str] = ("lm_head.weight",)
) -> dict[str, Tensor]:
    """The tensors as a head of ours has them: float32, the draft vocabulary ascending, both maps there.

    Args:
        tensors: of a published head; without `d2t` it drafts all of the vocabulary.
        size: of its draft vocabulary.
        vocabulary: of the target.
        by_draft_token: tensors with a row for each draft token.

    Raises:
        HeadError: the maps contradict each other or the vocabulary.
    """
    places = torch.arange(size)
    offsets = tensors.get("d2t", torch.zeros(size, dtype=torch.int64)).long()
    ids = places + offsets
    marked = torch.zeros(vocabulary, dtype=torch.bool)
    fits = bool(((ids >= 0) & (ids < vocabulary)).all()) and len(ids.unique()) == size
    if fits:
        marked[ids] = True
    given = tensors.get("t2d")
    if not fits or (given is not None and not torch.equal(given.bool(), marked)):
        absolute = given is not None and torch.equal(offsets.sort().values, given.nonzero()[:, 0])
        raise HeadError(
            "its d2t holds target ids; expected offsets, target id less draft id"
            if absolute
            else "its d2t does not lead to different ids of the vocabulary"
            if not fits
            else f"its d2t leads to other ids than the {int(given.bool().sum()) if given is not None else 0} that its "
            "t2d marks"
        )
    order = ids.argsort()
    floats = {name: tensor.float() for name, tensor in tensors.items() if name not in MAPS}
    for name in by_draft_token:
        floats[name] = floats[name][order]
    return floats | {"d2t": ids[order] - places, "t2d": marked}
