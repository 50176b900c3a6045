"""Whether the answers are the target's own, told from its features.

Where the target answered greedily, every trained token is its first choice, but for near ties that another batch rounds
differently. Answers drawn at a temperature keep most of that; answers that another model wrote, or the same model with
other weights, do not.
"""

from __future__ import annotations

import torch

from sstf.features.store import FeatureStore

LOOKED_AT = 256  # conversations, evenly taken


def argmax_share(store: FeatureStore, conversations: int = LOOKED_AT) -> float:
    """Share of the trained tokens x_{t+1} that are the target's argmax at h_t; 0 if none is trained."""
    hits = trained = 0
    for i in torch.linspace(0, len(store) - 1, min(conversations, len(store))).long().tolist():
        row = store[i]
        mask = row.loss_mask[1:]
        hits += int((row.teacher_token[:-1][mask] == row.input_ids[1:][mask]).sum())
        trained += int(mask.sum())
    return hits / trained if trained else 0.0
