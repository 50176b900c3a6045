"""Alignment, in this one place, and the order in which conversations are trained on.

A conversation `x_0 .. x_5` (x_0 x_1 are the prompt, x_2 .. x_5 the answer) has stored rows h_0 .. h_5; h_t predicts
x_{t+1}. A head that continues after the target emitted x_{t+1} knows h_t and x_{t+1}, and predicts x_{t+2}:

| row t | draft input features | draft input token | teacher distribution | supervised token | loss mask |
|---|---|---|---|---|---|
| 0 | aux(h_0) | x_1 | lm_head(h_1) | x_2 | yes: x_2 is the answer's first token |
| 1 | aux(h_1) | x_2 | lm_head(h_2) | x_3 | yes |
| 2 | aux(h_2) | x_3 | lm_head(h_3) | x_4 | yes |
| 3 | aux(h_3) | x_4 | lm_head(h_4) | x_5 | yes |

So n tokens give n - 2 rows, and the loss mask moves together with the supervised token. Test-time-training step i
reads token x_{t+1+i} and is supervised by the teacher of h_{t+1+i}: the same rows shifted left by i (`shift_left`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sstf.features.store import Features, FeatureStore
from sstf.types import FeatureBatch


def collate(rows: Sequence[Features]) -> FeatureBatch:
    """Align conversations of three tokens or more and pad them at the end. `seq` is the longest's tokens less 2."""
    seq = max(len(row.input_ids) for row in rows) - 2

    def stack(parts: list[Tensor]) -> Tensor:
        out = parts[0].new_zeros(len(parts), seq, *parts[0].shape[1:])
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
        return out

    return FeatureBatch(
        features=stack([row.features[:-2] for row in rows]),
        input_ids=stack([row.input_ids[1:-1] for row in rows]),
        teacher_hidden=stack([row.hidden[1:-1] for row in rows]),
        teacher_token=stack([row.teacher_token[1:-1] for row in rows]),
        teacher_lse=stack([row.teacher_lse[1:-1] for row in rows]),
        labels=stack([row.input_ids[2:] for row in rows]),
        loss_mask=stack([row.loss_mask[2:] for row in rows]),
    )


def shift_left(rows: Tensor, by: int) -> Tensor:
    """Row t takes the value of row t + `by`; the end is filled with zeros (False in a mask).

    >>> shift_left(torch.tensor([[1, 2, 3]]), 1)
    tensor([[2, 3, 0]])
    """
    if by == 0:
        return rows
    out = torch.zeros_like(rows)
    out[:, :-by] = rows[:, by:]
    return out


def to_device(batch: FeatureBatch, device: torch.device) -> FeatureBatch:
    """The batch on `device`."""
    return FeatureBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(batch).items()})


def split(store: FeatureStore, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and of held-out conversations; the latter are the same for every run with this seed.

    Conversations of fewer than three tokens have no row and are left out.
    """
    usable = [i for i, length in enumerate(store.lengths) if length >= 3 and store.trained[i] > 0]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {usable[i] for i in order[: min(validation, len(usable) // 4)]}
    return [i for i in usable if i not in held_out], sorted(held_out)


def epoch_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch: positions into `lengths`, shuffled, of like length, within `batch_tokens`.

    A pure function of its arguments, so a resumed run needs no data state but its step number.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    pool = 64  # sorting within pools keeps both the shuffle and little padding
    for start in range(0, len(order), pool):
        width = 0
        current: list[int] = []
        for index in sorted(order[start : start + pool], key=lambda i: lengths[i]):
            width = max(width, lengths[index])
            if current and width * (len(current) + 1) > batch_tokens:
                batches.append(current)
                current, width = [], lengths[index]
            current.append(index)
        batches.append(current)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
