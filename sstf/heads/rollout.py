"""Decoder layers over drafted rows, in the order in which training and autograd run them.

What a row sees in every layer is what `ttt_attention` computes: row t of step 0 sees the rows 0..t of its document; a
later step at t sees these, and then the earlier steps at t alone. Memory grows linearly with the rows: of attention,
only inputs, output and log-sum-exp are kept, and what the steps share is kept once.

`Rollout` goes step by step, for heads that read their own output (test-time training). `in_one_pass` takes all steps
at once, for heads that draft in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sstf.heads.ttt_attention import Seen, pick, ttt_attention, ttt_attention_backward, ttt_attention_reference
from sstf.row_blocks import filled


class Layer(Protocol):
    """A decoder layer without its attention."""

    def qkv(self, embeds: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value, [row, heads or kv_heads, head_dim]; both inputs are [row, hidden]."""

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, of what it read and what attention returned."""


KeyValue = tuple[Tensor, Tensor]
# (query, key and value of step 0, those of later steps, rows, lengths) -> attended; see `attend`
Attend = Callable[[Tensor, KeyValue, Sequence[KeyValue], Tensor, Sequence[int]], Tensor]


def attend(
    query: Float[Tensor, "row heads dim"],
    first: KeyValue,
    later: Sequence[KeyValue],
    rows: Int[Tensor, "row"],
    lengths: Sequence[int],
) -> Float[Tensor, "row heads dim"]:
    """`ttt_attention` that autograd can differentiate.

    Args:
        query: of this step.
        first: key and value of step 0, [seq, kv_heads, dim].
        later: of steps 1 up to this one, [row, kv_heads, dim].
        rows: where the queries stand in [seq], ascending.
        lengths: rows of each document in [seq], see `FeatureBatch`.
    """
    keys, values = [key for key, _ in later], [value for _, value in later]
    out: Tensor = _Attend.apply(rows, lengths, query, *first, *keys, *values)  # type: ignore[no-untyped-call]
    return out


def attend_reference(
    query: Tensor, first: KeyValue, later: Sequence[KeyValue], rows: Tensor, lengths: Sequence[int]
) -> Tensor:
    """`attend` with a mask over the whole score matrix."""
    seen = _seen(*first, [key for key, _ in later], [value for _, value in later], rows)
    return ttt_attention_reference(query, seen, rows, lengths)


def _seen(key: Tensor, value: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Tensor) -> Seen:
    if not keys:
        none = key.new_empty(len(rows), key.shape[1], 0, key.shape[2])
        return Seen(key, value, none, none)
    return Seen(key, value, torch.stack(list(keys), 2), torch.stack(list(values), 2))


class _Attend(torch.autograd.Function):
    """Both passes run in the dtype of their inputs: under autocast, a product of float32 would be rounded."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor, *later: Tensor
    ) -> Tensor:
        half = len(later) // 2
        with torch.autocast(query.device.type, enabled=False):
            seen = _seen(key, value, later[:half], later[half:], rows)
            out, lse = ttt_attention(query, seen, rows, lengths)
        ctx.lengths = lengths
        ctx.save_for_backward(rows, query, key, value, out, lse, *later)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, query, key, value, out, lse, *later = ctx.saved_tensors
        half = len(later) // 2
        with torch.autocast(grad.device.type, enabled=False):
            seen = _seen(key, value, later[:half], later[half:], rows)
            of_query, found = ttt_attention_backward(grad, query, seen, out, lse, rows, ctx.lengths)
        return (
            None, None, of_query, found.key, found.value, *found.later_keys.unbind(2), *found.later_values.unbind(2)
        )  # fmt: skip


class Rollout:
    """Layers of a head that is run step by step over the same rows; keeps what later steps look at.

    Args:
        layers: from the first to the last.
        rows: [row] int64, ascending, where later steps are run, and the last layer of step 0.
        lengths: rows of each document.
        how: `attend`, or its reference.
    """

    def __init__(self, layers: Sequence[Layer], rows: Tensor, lengths: Sequence[int], how: Attend = attend) -> None:
        self.layers, self.rows, self.lengths, self.how = layers, rows, lengths, how
        self.first: list[KeyValue] = []  # of each layer
        self.later: list[list[KeyValue]] = [[] for _ in layers]

    def start(self, embeds: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Float[Tensor, "row hidden"]:
        """Step 0, of all rows [seq, hidden]; the output at `rows`."""
        every = torch.arange(len(x), device=x.device)
        for layer in self.layers:
            rows = self.rows if layer is self.layers[-1] else every
            query, key, value = layer.qkv(embeds, x, cos, sin)
            self.first.append((key, value))
            x = layer.finish(pick(x, rows), self.how(pick(query, rows), (key, value), [], rows, self.lengths))
        return x

    def step(self, embeds: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Float[Tensor, "row hidden"]:
        """The next step, of [row, hidden]."""
        for layer, first, later in zip(self.layers, self.first, self.later, strict=True):
            query, key, value = layer.qkv(embeds, x, cos, sin)
            later.append((key, value))
            x = layer.finish(x, self.how(query, first, later, self.rows, self.lengths))
        return x


def in_one_pass(
    layers: Sequence[Layer],
    embeds: Float[Tensor, "all hidden"],
    x: Float[Tensor, "all hidden"],
    turn: tuple[Tensor, Tensor],
    depths: Sequence[Int[Tensor, "row"]],
    lengths: Sequence[int],
    how: Attend = attend,
) -> Float[Tensor, "pair hidden"]:
    """All steps at once, for heads whose later steps do not read the earlier ones' outputs.

    Args:
        layers: from the first to the last.
        embeds: of all rows [seq] of step 0, then of the rows of step 1, and so on.
        x: what the first layer reads beside them.
        turn: cosine and sine of the same rows.
        depths: of each step, the rows at which it is run, ascending; those of step 2 are among those of step 1, and so
            on. Step 0 is run everywhere and handed out at `depths[0]`.
        lengths: rows of each document in [seq].
        how: `attend`, or its reference.

    Returns:
        The last layer's output at the rows of each step, one step after the other.
    """
    seq = sum(lengths)
    sizes = [seq, *(len(rows) for rows in depths[1:])]
    every = torch.arange(seq, device=x.device)
    # Where each step's rows stand among those of the step before.
    places = [torch.searchsorted(before, rows) for before, rows in pairwise(depths[1:])]
    embeds, cos, sin = filled(embeds), filled(turn[0]), filled(turn[1])
    for layer in layers:
        rows = depths[0] if layer is layers[-1] else every
        parts = (part[: sum(sizes)].split(sizes) for part in layer.qkv(embeds, filled(x), cos, sin))
        queries, keys, values = parts
        first = keys[0], values[0]
        attended = [how(pick(queries[0], rows), first, [], rows, lengths)]
        later: list[KeyValue] = []
        for depth in range(1, len(depths)):
            kept = [(key[places[depth - 2]], value[places[depth - 2]]) for key, value in later]
            later = [*kept, (keys[depth], values[depth])]
            attended.append(how(queries[depth], first, later, depths[depth], lengths))
        behind = torch.cat(attended)
        x = layer.finish(filled(torch.cat([pick(x[:seq], rows), x[seq:]])), filled(behind))[: len(behind)]
    return x
