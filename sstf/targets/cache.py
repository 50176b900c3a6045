"""A preallocated key/value cache for stock transformers models.

transformers' `DynamicCache` concatenates, so every step copies the whole cache, and it cannot drop the rejected
nodes of a draft tree. This one writes in place, and `keep` moves the accepted nodes together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Plan:
    """Where the next forward pass writes. Shared by all layers, so it is set once a pass."""

    def __init__(self) -> None:
        self.length = 0  # tokens that every row holds already, when all rows advance together
        self.rows: Tensor | None = None  # [rows] cache rows written; None: all, at `length`
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
        if len(plan.rows) == self.batch:  # all rows, in order: a view, no copy
            return self.keys[:, :, : plan.visible], self.values[:, :, : plan.visible]
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
    - all rows advance together (`advance` after the pass, `keep` after a tree): the decoder;
    - `write_rows` places each row's tokens at its own positions: batched sampling with rows of different lengths.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int) -> None:
        self.plan = _Plan()
        self.capacity = capacity
        self._kv = [_Layer(self.plan, batch, capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self._kv))

    @property
    def length(self) -> int:
        """Tokens held by every row."""
        return self.plan.length

    def advance(self, count: int) -> None:
        """Make the last `count` written tokens permanent."""
        self.plan.length += count

    def keep(self, offsets: Tensor) -> None:
        """Of the tokens written behind `length`, keep those at `offsets` (ascending), in place, and advance.

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

    def write_rows(self, rows: Tensor, positions: Tensor, visible: int) -> None:
        """Direct the next pass to `rows` [rows], its tokens to `positions` [rows, seq], with keys [:visible] seen."""
        self.plan.rows, self.plan.positions, self.plan.visible = rows, positions, visible


def causal_mask(positions: Tensor, visible: int) -> Tensor:
    """4-D mask for rows whose key j stands at position j: query at position p sees keys 0..p.

    Args:
        positions: [batch, seq] int64.
        visible: number of keys.

    Returns:
        [batch, 1, seq, visible] bool, True where attention is allowed.
    """
    return torch.arange(visible, device=positions.device) <= positions[:, None, :, None]
