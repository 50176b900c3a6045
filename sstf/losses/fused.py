"""Distillation that never holds [row, draft_vocab] for more than a chunk of rows.

The gradient of every objective is known in closed form (`objectives`), so it is computed in the forward pass, chunk
by chunk, and only [row, hidden] and the weight's gradient are kept (the idea of Liger-Kernel's fused linear cross
entropy, arXiv 2410.10989). The teacher is made chunk by chunk too: draft rows are taken in the order of their teacher
rows, so that a chunk needs few of them, each for all the steps of test-time training that ask for it.

Two sizes matter. A chunk of rows goes through the three matrix products at once; its logits are overwritten by their
gradient. Between the products, blocks small enough to stay in a core's cache go through everything else: on a CPU
these passes would cost more than the products if each went through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sstf.losses.eager import Added, Distilled
from sstf.losses.objectives import FLOOR, Objective
from sstf.losses.teachers import Teacher, Teachers, rows_in_cache
from sstf.row_blocks import missing

CHUNK = 512  # draft rows of [row, draft_vocab] held at once
TOKENS = 2048  # rows of the weight whose gradient is computed at once


def fused_distill(
    hidden: Float[Tensor, "row hidden"],
    weight: Float[Tensor, "draft_vocab hidden"],
    teachers: Teachers,
    rows: Int[Tensor, "row"],
    weights: Float[Tensor, "row"],
    objective: Objective,
    chunk: int = CHUNK,
    added: Added | None = None,
    reverse: Float[Tensor, "row"] | None = None,
) -> Distilled:
    """Sum of weighted objectives of the draft logits hidden @ weight.T, and what happened in each row.

    Products run in the dtype of `hidden` (under autocast, in its dtype) and the rest in float32 at least; the weight's
    gradient is accumulated in float32. NaN and infinities, of the draft or of the teacher, reach the losses of their
    rows. The gradient is computed for what requires one, and handed out once: a second backward raises.

    Args:
        hidden: [row, hidden] draft states after the head's final norm.
        weight: [draft_vocab, hidden] of the draft's lm_head; may be wider than `hidden`, as float32 master weights are.
        teachers: makes the distributions of some teacher rows. Called with consecutive slices, from the first row
            that `rows` names to the last; where a chunk ends inside a teacher row's users, the next begins with it.
        rows: [row] int64, the teacher row of each draft row.
        weights: [row] float32.
        objective: what to compute.
        chunk: draft rows at once. Memory is about chunk * draft_vocab * (bytes of a logit + 12 * teacher rows / rows),
            besides the weight's gradient in float32.
        added: to the logits. Where `weight` needs no gradient, that of `added.weight` alone is computed.
        reverse: [row] float32, weight of the reverse KL that is added to a row's objective; None adds nothing.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    hidden, given = hidden.to(dtype), len(hidden)
    if added is not None:  # one product with both matrices side by side
        hidden = torch.cat([hidden, added.states.to(dtype)], -1)
    # To whole blocks in the last chunk, by rows of no weight whose teacher row is read anyway.
    if lacking := min(missing(given, hidden.device), -given % chunk):
        hidden, weights = F.pad(hidden, (0, 0, 0, lacking)), F.pad(weights, (0, lacking))
        rows = torch.cat([rows, rows.max().expand(lacking)])
        reverse = reverse if reverse is None else F.pad(reverse, (0, lacking))
    with torch.autocast(kind, enabled=False):
        loss_sum, losses, draft_token, overlap = _FusedDistill.apply(  # type: ignore[no-untyped-call]
            hidden, weight, added and added.weight, teachers, rows, weights, reverse, objective, chunk,
            torch.is_grad_enabled(),
        )  # fmt: skip
    return Distilled(loss_sum, losses[:given], draft_token[:given], overlap[:given])


class _FusedDistill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, more: Tensor | None, teachers: Teachers, rows: Tensor,
        weights: Tensor, reverse: Tensor | None, objective: Objective, chunk: int, graph: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        # `graph`: a leaf needs its gradient under `no_grad` too, so validation would compute it for nothing.
        of_hidden, of_weight, of_more = (graph and needed for needed in ctx.needs_input_grad[:3])
        ctx.widths = [weight.shape[1], 0 if more is None else more.shape[1]]
        low = weight.to(hidden.dtype)
        if more is not None:
            low = torch.cat([low, more.to(hidden.dtype)], 1)
        # Columns whose gradient is wanted.
        trained = slice(0 if of_weight else ctx.widths[0], sum(ctx.widths) if of_more else ctx.widths[0])
        work = _Work(hidden, low, objective, chunk, of_hidden, trained)
        order = rows.argsort(stable=True)
        ordered = rows[order]
        # The one wait for the device: the teacher rows at both ends of each chunk.
        firsts = ordered[::chunk].tolist()
        lasts = torch.cat([ordered[chunk - 1 :: chunk], ordered[-1:]]).tolist()
        for i, (first, last) in enumerate(zip(firsts, lasts, strict=False)):
            part = slice(i * chunk, (i + 1) * chunk)
            work.add(order[part], ordered[part] - first, teachers(slice(first, last + 1)), weights, reverse)
        ctx.gradients, ctx.wanted = (work.grad_hidden, work.grad_weight), (of_weight, of_more)
        ctx.mark_non_differentiable(work.losses, work.draft_token, work.overlap)
        loss_sum = (work.losses * weights).sum()
        if reverse is not None:
            loss_sum += (work.reversed * reverse).sum()
        return loss_sum, work.losses, work.draft_token, work.overlap

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of fused_distill was already handed out; compute the loss again")
        # Scaled in place and let go: the weight's gradient is the largest tensor here.
        of_hidden, of_weights = [one if one is None else one.mul_(grad_loss) for one in ctx.gradients]
        ctx.gradients = None
        parts: list[Tensor | None] = [None, None]
        if of_weights is not None:
            widths = [width for width, wanted in zip(ctx.widths, ctx.wanted, strict=True) if wanted]
            found = iter(of_weights.split(widths, 1))
            parts = [next(found) if wanted else None for wanted in ctx.wanted]
        return (of_hidden, *parts, *(None,) * 7)


@dataclass(frozen=True)
class _Rows:
    """What one pass over some rows finds out."""

    draft_token: Tensor  # [row, 1] int64
    fit: Tensor  # [row, 1], sum_v target_probs * log draft_probs up to the normaliser; of the label for a hard target
    total: Tensor  # [row, 1], sum of the exponentials
    overlap: Tensor  # [row, 1]
    reversed: Tensor  # [row, 1], the reverse KL; zeros where none was asked for


@dataclass(frozen=True)
class _Pull:
    """What rows with a reverse KL have besides."""

    coverage: Tensor  # [row, 1]
    weights: Tensor  # [row, 1], of the objective
    reverse: Tensor  # [row, 1], of the reverse KL


class _Work:
    """One call: what every chunk reads, the room that they share, and what they add to."""

    def __init__(
        self, hidden: Tensor, low: Tensor, objective: Objective, chunk: int, of_hidden: bool, trained: slice
    ) -> None:
        vocab, chunk = len(low), min(chunk, len(hidden))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.objective = hidden, objective
        self.low, self.trained = low, trained
        self.grad_hidden = torch.empty_like(hidden) if of_hidden else None
        columns = trained.stop - trained.start
        self.grad_weight = low.new_zeros(vocab, columns, dtype=wide) if columns > 0 else None
        self.losses = hidden.new_empty(len(hidden), dtype=wide)
        self.overlap, self.reversed = torch.empty_like(self.losses), torch.empty_like(self.losses)
        self.draft_token = torch.empty_like(self.losses, dtype=torch.int64)
        self.logits = hidden.new_empty(chunk, vocab)  # then their gradient
        size = rows_in_cache(self.logits)
        self.cached = hidden.new_empty(max(3 * size * vocab, hidden.shape[1]), dtype=wide)
        self.room = self.cached[: 3 * size * vocab].view(3, size, vocab)

    def add(self, part: Tensor, rows: Tensor, target: Teacher, weights: Tensor, reverse: Tensor | None) -> None:
        """Draft rows `part`, against `rows` of `target`."""
        states = self.hidden.index_select(0, part)
        logits = torch.mm(states, self.low.t(), out=self.logits[: len(part)])
        coverage, label = target.coverage[rows, None], target.token[rows, None]
        # For a hard target one, or NaN: the argmax of a broken teacher means nothing.
        scale = (coverage if self.objective.hard else 1) / coverage
        # Small operations are as slow as large ones on a block: whatever is not [row, draft_vocab] is done by chunk.
        size = self.room.shape[1]
        given = [one.split(size) for one in (logits, rows, scale, label)]
        share = weights[part, None]
        pulls: list[_Pull | None] = [None] * len(given[0])
        if reverse is not None:
            # Weighted here: the sum of two gradients with weights of their own.
            columns = (coverage, share.to(coverage.dtype), reverse[part, None].to(coverage.dtype))
            pulls = [_Pull(*views) for views in zip(*(one.split(size) for one in columns), strict=True)]
            share = torch.ones_like(share)
        blocks = [self._block(target.probs, *views) for views in zip(*given, pulls, strict=True)]
        draft_token, fit, total, overlap, self.reversed[part, None] = (
            torch.cat([getattr(block, name) for block in blocks])
            for name in ("draft_token", "fit", "total", "overlap", "reversed")
        )
        divergence = total.log() - fit
        if not self.objective.hard:
            divergence -= target.entropy[rows, None]
        self.losses[part] = self.objective.losses(divergence, overlap)[:, 0]
        self.overlap[part], self.draft_token[part] = overlap[:, 0], draft_token[:, 0]
        # Weights scale [row, hidden], not [row, draft_vocab].
        share = share.to(states.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden.index_copy_(0, part, (logits @ self.low).mul_(share))
        if self.grad_weight is not None:
            self._add_to_weight(logits, states[:, self.trained].mul_(share), self.grad_weight)

    def _block(
        self, target_probs: Tensor, logits: Tensor, rows: Tensor, scale: Tensor, label: Tensor, pull: _Pull | None
    ) -> _Rows:
        """Go through a few rows in cache; `logits` become the gradient of the unweighted losses, or with `pull` of the
        weighted ones."""
        shifted, draft_probs, probs = self.room[:, : len(rows)]
        top, draft_token = shifted.copy_(logits).max(-1, keepdim=True)
        shifted.sub_(top)
        torch.index_select(target_probs, 0, rows, out=probs)
        if self.objective.hard:
            fit = shifted.gather(1, label) * scale
        else:
            fit = torch.mul(probs, shifted, out=draft_probs).sum(-1, keepdim=True) * scale
        total = torch.exp(shifted, out=draft_probs).sum(-1, keepdim=True)
        draft_probs.div_(total)
        reversed_kl, of_reverse = torch.zeros_like(total), None
        if pull is not None:
            of_reverse = (probs / pull.coverage).clamp_min_(FLOOR).log_().neg_().add_(shifted).sub_(total.log())
            reversed_kl = (draft_probs * of_reverse).sum(-1, keepdim=True)
            of_reverse.sub_(reversed_kl).mul_(draft_probs)
        overlap = torch.minimum(probs, draft_probs, out=shifted).sum(-1, keepdim=True)
        if self.grad_hidden is not None or self.grad_weight is not None:
            along = torch.ones_like(overlap)
            if (slopes := self.objective.slopes(overlap)) is not None:
                along, across = slopes
                signs = torch.sub(probs, draft_probs, out=shifted).sign_().mul_(draft_probs)
                half = across / 2
                draft_probs.mul_(along - half * signs.sum(-1, keepdim=True)).addcmul_(signs, half)
            if self.objective.hard:
                draft_probs.scatter_add_(1, label, -along * scale)
            else:
                draft_probs.addcmul_(probs, along * scale, value=-1)
            if pull is not None and of_reverse is not None:
                draft_probs.mul_(pull.weights).addcmul_(of_reverse, pull.reverse)
            logits.copy_(draft_probs)
        return _Rows(draft_token, fit, total, overlap, reversed_kl)

    def _add_to_weight(self, grad_logits: Tensor, states: Tensor, total: Tensor) -> None:
        """total += grad_logits.T @ states, some tokens at a time.

        The sum of two dtypes would make a converted copy in fresh memory: the conversion goes through what is in cache.
        """
        size = len(self.cached) // states.shape[1]
        for start in range(0, len(total), TOKENS):
            some = slice(start, start + TOKENS)
            product = grad_logits[:, some].t() @ states
            for one, other in zip(product.split(size), total[some].split(size), strict=True):
                other += self.cached[: one.numel()].view_as(one).copy_(one)
