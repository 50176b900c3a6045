"""A preallocated key/value cache for stock transformers models.

transformers' `DynamicCache` concatenates, so every step copies the whole cache, and it cannot drop the rejected
nodes of a draft tree. This one writes in place, and `keep` moves the accepted nodes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)


class _Plan:
    """Where the next forward pass writes. Shared by all layers, so it is set once a pass."""

    def __init__(self) -> None:
        self.length = 0  # tokens that every row holds already, when all rows advance together
        self.rows: Tensor | None = None  # [rows] cache rows written; None: all, at `length`
        self.block: slice | None = None  # the same rows, where they are neighbours: read without a copy
        self.positions: Tensor | None = None  # [rows, seq] where in each row
        self.visible = 0  # the keys returned are [:visible]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, `[batch, kv_heads, capacity, head_dim]`."""

    is_sliding = False

    def __init__(self, plan: _Plan, batch: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = plan
        self.batch, self.capacity = batch, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(like: Tensor) -> Tensor:
            return like.new_zeros(self.batch, like.shape[1], self.capacity, like.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        plan = self.plan
        if plan.rows is None:
            end = plan.length + key_states.shape[2]
            self.keys[:, :, plan.length : end] = key_states
            self.values[:, :, plan.length : end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        assert plan.positions is not None
        index = (plan.rows[:, None], slice(None), plan.positions)
        self.keys[index] = key_states.transpose(1, 2)
        self.values[index] = value_states.transpose(1, 2)
        block = slice(None) if len(plan.rows) == self.batch else plan.block
        if block is not None:
            return self.keys[block, :, : plan.visible], self.values[block, :, : plan.visible]
        return self.keys[plan.rows, :, : plan.visible], self.values[plan.rows, :, : plan.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.plan.length

    def get_max_length(self) -> int:
        return self.capacity


class PreallocatedCache(Cache):
    """Key/value cache with room for `capacity` tokens in each of `batch` rows.

    Two ways to write:
    - `write_behind` before a pass, `keep` after a tree: all rows advance together, as a single sequence does;
    - `write_rows`, `keep_rows`: each row's tokens stand at its own positions, for sequences of different lengths.
    """

    def __init__(self, kinds: Sequence[str], batch: int, capacity: int) -> None:
        """Args:
        kinds: `attention` or `recurrent`, one a layer. A recurrent state is transformers' own; with one, rows must
            advance together.
        batch: rows.
        capacity: tokens a row.
        """
        self.plan = _Plan()
        self.capacity = capacity
        layers: list[Any] = [
            _Layer(self.plan, batch, capacity) if kind == "attention" else LinearAttentionLayer() for kind in kinds
        ]
        self._kv = [layer for layer in layers if isinstance(layer, _Layer)]
        self._states = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
        super().__init__(layers=layers)

    def keep(self, offsets: Tensor) -> None:
        """Of the tokens that the last pass wrote, keep those at `offsets` (ascending), in place, and advance.

        Args:
            offsets: [kept] int64, 0 is the first token written by the last pass.
        """
        start, count = self.plan.length, len(offsets)
        source = offsets + start
        for layer in self._kv:
            assert layer.keys is not None and layer.values is not None
            layer.keys[:, :, start : start + count] = layer.keys[:, :, source]
            layer.values[:, :, start : start + count] = layer.values[:, :, source]
        self.plan.length += count

    def keep_rows(self, rows: Tensor, lengths: Tensor, offsets: Tensor, layers: int | None = None) -> None:
        """The same for sequences of different lengths.

        Args:
            rows: [rows] int64, the cache rows of the last pass.
            lengths: [rows] int64, tokens that each held before it.
            offsets: [rows, kept] int64, 0 is the first token of the pass; shorter rows are padded with anything, what
                that moves lies behind the row's new end.
            layers: only in so many of the first layers, all of which keep keys and values.
        """
        source = lengths[:, None] + offsets
        index = (rows[:, None], slice(None), lengths[:, None] + torch.arange(offsets.shape[1], device=rows.device))
        for layer in self._kv[:layers]:
            assert layer.keys is not None and layer.values is not None
            layer.keys[index] = layer.keys[rows[:, None], :, source]
            layer.values[index] = layer.values[rows[:, None], :, source]

    def forget(self) -> None:
        """Set the recurrent states back to their beginning, for another sequence."""
        for layer in self._states:
            layer.reset()

    def states(self) -> list[tuple[dict[int, Tensor | None], ...]]:
        """A copy of the recurrent states, for `restore`."""
        return [
            tuple(
                {i: None if state is None else state.clone() for i, state in states.items()}
                for states in (layer.conv_states, layer.recurrent_states)
            )
            for layer in self._states
        ]

    def restore(self, states: list[tuple[dict[int, Tensor | None], ...]]) -> None:
        """Take the last pass back out of the recurrent states."""
        for layer, (conv, recurrent) in zip(self._states, states, strict=True):
            layer.conv_states, layer.recurrent_states = conv, recurrent

    def write_behind(self, length: int) -> None:
        """Direct the next pass of a cache whose rows advance together behind its first `length` tokens."""
        self.plan.rows, self.plan.length = None, length

    def write_rows(self, rows: Tensor, positions: Tensor, visible: int, block: slice | None = None) -> None:
        """Direct the next pass to `rows` [rows], its tokens to `positions` [rows, seq], with keys [:visible] seen.
        `block` is the same as `rows`, where these are neighbours in ascending order."""
        self.plan.rows, self.plan.positions, self.plan.visible, self.plan.block = rows, positions, visible, block


def causal_mask(positions: Tensor, visible: int) -> Tensor:
    """Mask for rows whose key j stands at position j: query at position p sees keys 0..p.

    Args:
        positions: [batch, seq] int64.
        visible: number of keys.

    Returns:
        [batch, seq, visible] bool, True where attention is allowed.
    """
    return torch.arange(visible, device=positions.device) <= positions[:, :, None]


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What each layer of a model keeps between passes: `attention` keys and values, a `recurrent` state, or something
    else, named by transformers' class for it."""
    kinds: dict[type, str] = {
        DynamicLayer: "attention",
        DynamicSlidingWindowLayer: "attention",
        LinearAttentionLayer: "recurrent",
    }
    return tuple(kinds.get(type(layer), type(layer).__name__) for layer in DynamicCache(config=config).layers)
