"""Distillation of the target's next-token distribution into a draft vocabulary.

Notation: `target_probs` [row, draft_vocab] is the target's distribution restricted to the draft vocabulary and
renormalised; `coverage` [row] is the mass that the draft vocabulary holds of the full distribution. The per-token
loss is the forward KL divergence KL(target_probs || draft_probs), as in EAGLE-3 (arXiv 2503.01840).

`distill` is the eager reference. `fused_distill` gives the same numbers without ever holding [row, draft_vocab]
for more than a chunk of rows: the gradient of a softmax cross-entropy is known in closed form, so it is computed in
the forward pass, chunk by chunk, and only [row, hidden] and the weight's gradient are kept (the idea of Liger-Kernel's
fused linear cross-entropy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512  # rows of [row, draft_vocab] held at once


@dataclass(frozen=True)
class Teacher:
    """The target's distributions over the draft vocabulary, computed once a batch and shared by all steps."""

    probs: Float[Tensor, "row draft_vocab"]  # renormalised over the draft vocabulary
    coverage: Float[Tensor, "row"]  # mass of the draft vocabulary in the full distribution
    entropy: Float[Tensor, "row"]  # of `probs`, in nats


@dataclass(frozen=True)
class Distilled:
    """Per-token results. Only `loss_sum` carries a graph."""

    loss_sum: Tensor  # scalar, sum of weights * losses
    losses: Float[Tensor, "row"]  # KL in nats
    draft_token: Int[Tensor, "row"]  # argmax of the draft, in draft ids
    overlap: Float[Tensor, "row"]  # sum_v min(target_probs over the full vocabulary, draft_probs)


def teacher(logits: Float[Tensor, "row draft_vocab"], full_lse: Float[Tensor, "row"]) -> Teacher:
    """From the target's logits over the draft vocabulary and its log-sum-exp over the whole vocabulary."""
    log_probs = torch.log_softmax(logits.float(), -1)
    probs = log_probs.exp()
    coverage = (logits.float().logsumexp(-1) - full_lse).exp().clamp(max=1.0)
    return Teacher(probs, coverage, -(probs * log_probs).sum(-1))


def distill(
    hidden: Float[Tensor, "row hidden"],
    weight: Float[Tensor, "draft_vocab hidden"],
    target: Teacher,
    rows: Int[Tensor, "row"],
    weights: Float[Tensor, "row"],
) -> Distilled:
    """Eager reference: draft logits = hidden @ weight.T, against `target` at `rows`."""
    log_probs = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    probs = target.probs[rows].float()
    losses = -(probs * log_probs).sum(-1) - target.entropy[rows]
    overlap = torch.minimum(probs * target.coverage[rows, None], log_probs.exp()).sum(-1)
    return Distilled((losses * weights).sum(), losses.detach(), log_probs.argmax(-1), overlap.detach())


def fused_distill(
    hidden: Float[Tensor, "row hidden"],
    weight: Float[Tensor, "draft_vocab hidden"],
    target: Teacher,
    rows: Int[Tensor, "row"],
    weights: Float[Tensor, "row"],
) -> Distilled:
    """As `distill`, in bounded memory. `weight` may be float32 while `hidden` is bfloat16: products run in the
    dtype of `hidden`, the weight's gradient is accumulated in float32."""
    loss_sum, losses, draft_token, overlap = _FusedDistill.apply(  # type: ignore[no-untyped-call]
        hidden, weight, target.probs, target.coverage, target.entropy, rows, weights, torch.is_grad_enabled()
    )
    return Distilled(loss_sum, losses, draft_token, overlap)


class _FusedDistill(torch.autograd.Function):
    """d loss / d logits = weight * (draft_probs - target_probs), since target_probs sums to one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, probs: Tensor, coverage: Tensor, entropy: Tensor, rows: Tensor,
        weights: Tensor, graph: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        low = weight.to(hidden.dtype)
        count = len(hidden)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        overlap = torch.empty_like(losses)
        draft_token = torch.empty(count, dtype=torch.int64, device=hidden.device)
        # `graph`: a leaf needs its gradient under `no_grad` too, so validation would compute it for nothing.
        learns = graph and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            target = probs[rows[part]].float()
            log_probs = torch.log_softmax(F.linear(hidden[part], low).float(), -1)
            losses[part] = -torch.linalg.vecdot(target, log_probs) - entropy[rows[part]]
            draft_token[part] = log_probs.argmax(-1)
            draft = log_probs.exp_()
            overlap[part] = torch.minimum(target * coverage[rows[part], None], draft).sum(-1)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = draft.sub_(target).mul_(weights[part, None]).to(hidden.dtype)
                grad_hidden[part] = grad_logits @ low
                grad_weight += (grad_logits.T @ hidden[part]).float()
        if learns:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses, draft_token, overlap)
        return (losses * weights).sum(), losses, draft_token, overlap

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        unneeded = (None,) * 6
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss, *unneeded
