"""Test-time training of the EAGLE layer over packed documents: all steps forward, and all steps backward.

The arithmetic is that of `Eagle3Head.unroll_reference`, which autograd differentiates. What is different here:

- only the `rows` that are learned from run through the layer; all others give step 0's keys and values alone;
- what the projections make of a token's embedding is the same in every step, so it comes in once, as `from_tokens`;
- query, key and value are one product, gate and up another, and weights are cast once for all steps;
- backward keeps the inputs of norms, attention and gate, computes again what follows from them, and writes gradients
  over what it has done with; gradients of weights, and of what several steps read, are added up in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sstf.heads.by_hand import gated, gated_backward_, inverse_rms, rms, rms_backward, rotate_
from sstf.heads.ttt_attention import Seen, pick, spread, ttt_attention, ttt_attention_backward


@dataclass(frozen=True)
class UnrollPlan:
    """What is computed where."""

    reads: Int[Tensor, "steps row"]  # see `Eagle3Head.unroll`
    lengths: Sequence[int]  # rows of each document
    turns: Sequence[tuple[Tensor, Tensor]]  # cosine and sine of each step, [seq or row, 1, half of head_dim]
    heads: int
    kv_heads: int
    eps: float  # of the norms
    norm_before_residual: bool = False  # see `eagle.py`; `norm_output` too
    norm_output: bool = False

    def heads_of(self, qkv: Float[Tensor, "row width"]) -> Float[Tensor, "row all_heads head_dim"]:
        """Of queries, keys and values side by side."""
        return torch.unflatten(qkv, 1, (self.heads + 2 * self.kv_heads, -1))

    def split(self, qkv: Float[Tensor, "row width"]) -> tuple[Tensor, ...]:
        """Views: query, key and value, [row, heads or kv_heads, head_dim]."""
        return torch.split(self.heads_of(qkv), [self.heads, self.kv_heads, self.kv_heads], 1)

    def turn_(self, qkv: Float[Tensor, "row width"], step: int, back: bool = False) -> None:
        """Rotate queries and keys to the positions of a step, in place."""
        cos, sin = self.turns[step]
        rotate_(self.heads_of(qkv)[:, : self.heads + self.kv_heads], cos, -sin if back else sin)


@dataclass(frozen=True)
class UnrollWeights:
    """Of the layer. `qkv` is the half of the projections that reads the state."""

    hidden_norm: Float[Tensor, "hidden"]
    qkv: Float[Tensor, "width hidden"]
    o: Float[Tensor, "hidden heads_dim"]
    post_norm: Float[Tensor, "hidden"]
    gate_up: Float[Tensor, "two_wide hidden"]
    down: Float[Tensor, "hidden wide"]
    out_norm: Float[Tensor, "hidden"]  # only read with `norm_output`


def unroll(
    g: Float[Tensor, "seq hidden"],
    from_tokens: Float[Tensor, "seq width"],
    weights: UnrollWeights,
    plan: UnrollPlan,
) -> Float[Tensor, "steps row hidden"]:
    """The layer's output in every step. Products run in the dtype of `g` and `from_tokens`, whatever the weights'."""
    out: Tensor = _Unroll.apply(plan, g, from_tokens, *vars(weights).values())  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class UnrollStates:
    """What two implementations of the layer are compared by."""

    middles: Float[Tensor, "steps row hidden"]  # behind attention: what the MLP reads and adds to
    outs: Float[Tensor, "steps row hidden"]


@torch.no_grad()
def unroll_states(g: Tensor, from_tokens: Tensor, weights: UnrollWeights, plan: UnrollPlan) -> UnrollStates:
    """What `unroll` computes, from the same code."""
    with torch.autocast(g.device.type, enabled=False):
        kept = _forward(g, from_tokens, _in_dtype(weights, g.dtype), plan)
    return UnrollStates(kept.middles, kept.outs)


@dataclass(frozen=True)
class _Kept:
    """What backward needs of forward: one buffer of each kind for all steps."""

    g: Tensor  # [seq, hidden]
    start: Tensor  # [row, hidden], g at the rows
    first: Tensor  # [seq, width], queries, keys and values of step 0
    queries: Tensor  # [steps, row, heads, head_dim]
    later_keys: Tensor  # [row, kv_heads, steps - 1, head_dim]
    later_values: Tensor
    attended: Tensor  # [steps, row, heads * head_dim]
    lse: Tensor  # [steps, row, heads] float32
    middles: Tensor  # [steps, row, hidden], what the MLP reads and adds to
    gate_up: Tensor  # [steps, row, two_wide]
    outs: Tensor  # [steps, row, hidden]

    def state(self, step: int, weights: UnrollWeights, plan: UnrollPlan) -> Tensor:
        """What a step reads at its rows."""
        if not step:
            return self.start
        out = self.outs[step - 1]
        return rms(out, weights.out_norm, plan.eps) if plan.norm_output else out

    def seen(self, step: int, plan: UnrollPlan) -> Seen:
        _, key, value = plan.split(self.first)
        return Seen(key, value, self.later_keys[:, :, :step], self.later_values[:, :, :step])


def _buffers(g: Tensor, first: Tensor, weights: UnrollWeights, plan: UnrollPlan) -> _Kept:
    (steps, count), (hidden, attended) = plan.reads.shape, weights.o.shape
    head_dim = attended // plan.heads
    later = (count, plan.kv_heads, steps - 1, head_dim)
    return _Kept(
        g=g,
        start=pick(g, plan.reads[0]),
        first=first,
        queries=g.new_empty(steps, count, plan.heads, head_dim),
        later_keys=g.new_empty(later),
        later_values=g.new_empty(later),
        attended=g.new_empty(steps, count, attended),
        lse=g.new_empty(steps, count, plan.heads, dtype=torch.float32),
        middles=g.new_empty(steps, count, hidden),
        gate_up=g.new_empty(steps, count, len(weights.gate_up)),
        outs=g.new_empty(steps, count, hidden),
    )


def _forward(g: Tensor, from_tokens: Tensor, weights: UnrollWeights, plan: UnrollPlan) -> _Kept:
    rows = plan.reads[0]
    normed = rms(g, weights.hidden_norm, plan.eps)
    first = torch.addmm(from_tokens, normed, weights.qkv.T)
    plan.turn_(first, 0)
    kept = _buffers(g, first, weights, plan)
    kept.queries[0] = pick(plan.split(first)[0], rows)
    state, normed = kept.start, pick(normed, rows)
    for step, read in enumerate(plan.reads):
        if step:
            state = kept.state(step, weights, plan)
            normed = rms(state, weights.hidden_norm, plan.eps)
            qkv = torch.addmm(from_tokens[read], normed, weights.qkv.T)
            plan.turn_(qkv, step)
            kept.queries[step], kept.later_keys[:, :, step - 1], kept.later_values[:, :, step - 1] = plan.split(qkv)
        attended, kept.lse[step] = ttt_attention(kept.queries[step], kept.seen(step, plan), rows, plan.lengths)
        kept.attended[step] = attended.flatten(1)
        middle, gate_up = kept.middles[step], kept.gate_up[step]
        residual = normed if plan.norm_before_residual else state
        torch.addmm(residual, kept.attended[step], weights.o.T, out=middle)
        torch.mm(rms(middle, weights.post_norm, plan.eps), weights.gate_up.T, out=gate_up)
        torch.addmm(middle, gated(gate_up), weights.down.T, out=kept.outs[step])
    return kept


class _Backward:
    """Walks the steps from the last to the first and adds up gradients in float32."""

    def __init__(self, kept: _Kept, weights: UnrollWeights, plan: UnrollPlan) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=torch.float32, device=like.device)

        self.kept, self.weights, self.plan = kept, weights, plan
        self.of_weights = UnrollWeights(*(zeros(part) for part in vars(weights).values()))
        self.of_tokens = zeros(kept.first)
        self.of_seen = Seen(*(zeros(part) for part in vars(kept.seen(len(plan.reads) - 1, plan)).values()))

    def run(self, grad: Tensor) -> Tensor:
        """From the gradient of `outs` to that of `g`, float32."""
        kept, rows, seen = self.kept, self.plan.reads[0], self.of_seen
        of_out = grad[-1].float()
        for step in range(len(grad) - 1, 0, -1):
            of_middle = self._mlp(step, of_out)
            of_query = self._attention(step, of_middle)
            # No earlier step sees these keys: their gradients are complete.
            of_qkv = torch.cat([of_query, seen.later_keys[:, :, step - 1], seen.later_values[:, :, step - 1]], 1)
            of_state = self._projection(step, of_qkv, of_middle)
            of_out = (self._fed_back(step, of_state) if self.plan.norm_output else of_state).add_(grad[step - 1])
        of_middle = self._mlp(0, of_out)
        of_query = spread(self._attention(0, of_middle), rows, len(kept.g))
        return self._projection(0, torch.cat([of_query, seen.key, seen.value], 1), of_middle)

    def _mlp(self, step: int, of_out: Tensor) -> Tensor:
        """Gradient of what the MLP reads and adds to."""
        middle, gate_up, eps = self.kept.middles[step], self.kept.gate_up[step], self.plan.eps
        low = of_out.to(middle.dtype)
        self.of_weights.down.add_(low.T @ gated_backward_(low @ self.weights.down, gate_up))
        of_gate_up = gate_up  # written over
        inverse = inverse_rms(middle, eps)
        unit = middle * inverse
        self.of_weights.gate_up.add_(of_gate_up.T @ (unit * self.weights.post_norm).to(low.dtype))
        of_middle, of_norm = rms_backward(of_gate_up @ self.weights.gate_up, unit, inverse, self.weights.post_norm)
        self.of_weights.post_norm.add_(of_norm)
        return of_middle.add_(of_out)

    def _attention(self, step: int, of_middle: Tensor) -> Tensor:
        """Gradient of the query; those of keys and values are added to `of_seen`."""
        kept, plan = self.kept, self.plan
        low, query, attended = of_middle.to(kept.middles.dtype), kept.queries[step], kept.attended[step]
        self.of_weights.o.add_(low.T @ attended)
        of_query, found = ttt_attention_backward(
            (low @ self.weights.o).view_as(query), query, kept.seen(step, plan), attended.view_as(query),
            kept.lse[step], plan.reads[0], plan.lengths,
        )  # fmt: skip
        self.of_seen.key.add_(found.key)
        self.of_seen.value.add_(found.value)
        self.of_seen.later_keys[:, :, :step].add_(found.later_keys)
        self.of_seen.later_values[:, :, :step].add_(found.later_values)
        return of_query

    def _projection(self, step: int, of_heads: Tensor, of_middle: Tensor) -> Tensor:
        """Gradient of the state that query, key and value were made of, and that the attention was added to."""
        plan, norm = self.plan, self.weights.hidden_norm
        state = self.kept.state(step, self.weights, plan) if step else self.kept.g
        of_qkv = of_heads.flatten(1)
        plan.turn_(of_qkv, step, back=True)
        if step:
            self.of_tokens.index_add_(0, plan.reads[step], of_qkv.float())
        else:
            self.of_tokens.add_(of_qkv)
        low = of_qkv.to(state.dtype)
        inverse = inverse_rms(state, plan.eps)
        unit = state * inverse
        self.of_weights.qkv.add_(low.T @ (unit * norm).to(low.dtype))
        of_normed = low @ self.weights.qkv
        if plan.norm_before_residual:
            of_normed = self._add_rows(of_normed.float(), of_middle)
        of_state, of_norm = rms_backward(of_normed, unit, inverse, norm)
        self.of_weights.hidden_norm.add_(of_norm)
        return of_state if plan.norm_before_residual else self._add_rows(of_state, of_middle)

    def _add_rows(self, whole: Tensor, part: Tensor) -> Tensor:
        """Add what the rows that are learned from have, to them alone (step 0) or to all that a later step has."""
        return whole.add_(part) if len(whole) == len(part) else whole.index_add_(0, self.plan.reads[0], part)

    def _fed_back(self, step: int, of_state: Tensor) -> Tensor:
        """Gradient of the output before a step, whose norm that step read."""
        out, norm = self.kept.outs[step - 1], self.weights.out_norm
        inverse = inverse_rms(out, self.plan.eps)
        of_out, of_norm = rms_backward(of_state, out * inverse, inverse, norm)
        self.of_weights.out_norm.add_(of_norm)
        return of_out


def _in_dtype(weights: UnrollWeights, dtype: torch.dtype) -> UnrollWeights:
    """Matrices in the dtype that products run in; the norms' weights stay."""
    return UnrollWeights(*(part.to(dtype) if part.ndim == 2 else part for part in vars(weights).values()))


class _Unroll(torch.autograd.Function):
    """Both passes run as written here: under autocast, a product of float32 would be rounded."""

    @staticmethod
    def forward(ctx: Any, plan: UnrollPlan, g: Tensor, from_tokens: Tensor, *parts: Tensor) -> Tensor:
        weights = _in_dtype(UnrollWeights(*parts), g.dtype)
        with torch.autocast(g.device.type, enabled=False):
            kept = _forward(g, from_tokens, weights, plan)
        ctx.plan = plan
        ctx.save_for_backward(*vars(weights).values(), *vars(kept).values())
        return kept.outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(fields(UnrollWeights))
        walk = _Backward(_Kept(*saved[count:]), UnrollWeights(*saved[:count]), ctx.plan)
        with torch.autocast(grad.device.type, enabled=False):
            of_g = walk.run(grad)
        return None, of_g, walk.of_tokens, *vars(walk.of_weights).values()
