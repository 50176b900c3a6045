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
reads token x_{t+1+i} and is supervised by the teacher of h_{t+1+i}: those of row t + i (`rows_ahead`). In the last i
rows of a conversation it is not supervised.

Teachers are stored, and stand in a batch, only where the supervised token is trained; the rest would never be read.
Stored row t teaches x_{t+1}, so a conversation whose second token x_1 is trained has one that no head can use: x_1
would have to be drafted before the target has emitted anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sstf.features.record import Features
from sstf.features.source import FeatureSource
from sstf.types import FeatureBatch, HiddenTeacher, TeacherRows, TopKTeacher

OPEN_BATCHES = 16  # that are filled beside each other


def collate(rows: Sequence[Features]) -> FeatureBatch:
    """Align conversations of three tokens or more and put them one after the other."""
    return FeatureBatch(
        features=torch.cat([row.features[:-2] for row in rows]),
        input_ids=torch.cat([row.input_ids[1:-1] for row in rows]),
        teacher=_joined([row.teacher for row in rows], [int(row.loss_mask[1]) for row in rows]),
        teacher_token=torch.cat([row.teacher_token[1:-1] for row in rows]),
        labels=torch.cat([row.input_ids[2:] for row in rows]),
        loss_mask=torch.cat([row.loss_mask[2:] for row in rows]),
        lengths=tuple(len(row.input_ids) - 2 for row in rows),
    )


def _joined(teachers: list[TeacherRows], skip: list[int]) -> TeacherRows:
    """The rows of all conversations, one after the other, without the first `skip` of each."""

    def cat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part[drop:] for part, drop in zip(parts, skip, strict=True)])

    hidden = [one for one in teachers if isinstance(one, HiddenTeacher)]
    if len(hidden) == len(teachers):
        return HiddenTeacher(cat([one.hidden for one in hidden]), cat([one.lse for one in hidden]))
    top = [one for one in teachers if isinstance(one, TopKTeacher)]
    return TopKTeacher(cat([one.tokens for one in top]), cat([one.log_probs for one in top]))


def rows_ahead(lengths: Sequence[int], steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What each test-time-training step reads at each row.

    Args:
        lengths: rows of each document, see `FeatureBatch`.
        steps: of test-time training.
        device: of the results.

    Returns:
        [steps, seq] int64, row t + i for step i, but never beyond the last row of t's own document; and [steps, seq]
        bool, whether row t + i exists there.

    >>> rows, there = rows_ahead((3, 1), 2, torch.device("cpu"))
    >>> rows.tolist()
    [[0, 1, 2, 3], [1, 2, 2, 3]]
    >>> there.tolist()
    [[True, True, True, True], [True, True, False, False]]
    """
    size = torch.tensor(lengths, device=device)
    last = (size.cumsum(0) - 1).repeat_interleave(size, output_size=sum(lengths))
    ahead = torch.arange(len(last), device=device) + torch.arange(steps, device=device)[:, None]
    return torch.minimum(ahead, last), ahead <= last


def to_device(batch: FeatureBatch, device: torch.device) -> FeatureBatch:
    """The batch on `device`."""

    def moved(holder: object) -> dict[str, Any]:
        return {key: t.to(device, non_blocking=True) for key, t in vars(holder).items() if isinstance(t, Tensor)}

    teacher = type(batch.teacher)(**moved(batch.teacher))
    return replace(batch, **moved(batch), teacher=teacher)


def split(
    source: FeatureSource, validation: int, seed: int, given: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of training and of held-out conversations; the latter are the same for every run with this seed, or those
    `given`.

    Conversations of fewer than three tokens have no row and are left out.
    """
    usable = [i for i, length in enumerate(source.lengths) if length >= 3 and source.trained[i] > 0]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {usable[i] for i in order[: min(validation, len(usable) // 4)]} if given is None else set(given)
    return [i for i in usable if i not in held_out], sorted(held_out)


def prompt_of(source: FeatureSource, index: int) -> list[int]:
    """Tokens of a conversation before the first trained one, from which its answer is decoded. Empty where nothing
    stands before it, or nothing is trained."""
    ids, mask = source.tokens_of(index)
    trained = mask.nonzero()[:1].flatten().tolist()
    return ids[: trained[0]].tolist() if trained else []


def epoch_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch: positions into `lengths`, shuffled, `batch_tokens` or less together.

    A conversation that is longer is a batch of its own. A pure function of its arguments, so a resumed run needs no
    data state but its step number.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches: list[list[int]] = []
    filling: list[list[int]] = []
    room: list[int] = []  # left in each of `filling`
    for index in torch.randperm(len(lengths), generator=generator).tolist():
        # The fullest that takes it; few are open, so that conversations stay near where the shuffle put them.
        fits = [left for left in room if left >= lengths[index]]
        if fits:
            at = room.index(min(fits))
        else:
            if len(filling) == OPEN_BATCHES:
                fullest = room.index(min(room))
                batches.append(filling.pop(fullest))
                room.pop(fullest)
            at = len(filling)
            filling.append([])
            room.append(batch_tokens)
        filling[at].append(index)
        room[at] -= lengths[index]
    batches += filling
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
