"""The plain form of distillation, differentiated by autograd: the reference that `fused` is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sstf.losses.objectives import FLOOR, Objective
from sstf.losses.teachers import Teachers


@dataclass(frozen=True)
class Distilled:
    """Per-token results. Only `loss_sum` carries a graph."""

    loss_sum: Tensor  # scalar, sum of weights * losses, and of the reverse KL where it was asked for
    losses: Float[Tensor, "row"]  # the objective of every row
    draft_token: Int[Tensor, "row"]  # argmax of the draft, in draft ids
    overlap: Float[Tensor, "row"]  # sum_v min(target_probs over the full vocabulary, draft_probs)


@dataclass(frozen=True)
class Added:
    """What a second matrix adds to the draft logits: states @ weight.T."""

    states: Float[Tensor, "row rank"]
    weight: Float[Tensor, "draft_vocab rank"]


def distill(
    hidden: Float[Tensor, "row hidden"],
    weight: Float[Tensor, "draft_vocab hidden"],
    teachers: Teachers,
    rows: Int[Tensor, "row"],
    weights: Float[Tensor, "row"],
    objective: Objective,
    added: Added | None = None,
    reverse: Float[Tensor, "row"] | None = None,
) -> Distilled:
    """Draft logits = hidden @ weight.T (+ `added`), against the teacher row that `rows` names; see `fused_distill`."""
    target = teachers(slice(0, int(rows.max()) + 1 if len(rows) else 0))
    target_probs = target.probs[rows]
    logits = F.linear(hidden, weight)
    if added is not None:
        logits = logits + F.linear(added.states, added.weight)
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    overlap = torch.minimum(target_probs, log_probs.exp()).sum(-1)
    if objective.hard:
        divergence = -log_probs.gather(1, target.token[rows, None])[:, 0]
    else:
        cross = -(target_probs * log_probs).sum(-1) / target.coverage[rows]
        divergence = cross - target.entropy[rows]
    losses = objective.losses(divergence, overlap)
    loss_sum = (losses * weights).sum()
    if reverse is not None:
        log_target = (target_probs / target.coverage[rows, None]).clamp_min(FLOOR).log()
        loss_sum = loss_sum + ((log_probs.exp() * (log_probs - log_target)).sum(-1) * reverse).sum()
    return Distilled(loss_sum, losses.detach(), log_probs.argmax(-1), overlap.detach())
