"""Passes that draft with the target's first layers and verify with the others: no token runs through a layer twice.

A drafted row is the root (the last emitted token) or a node. Its shallow states and keys are made once: while drafting,
or, for nodes that were never expanded and for sequences that drafted nothing, together at the beginning of the
verification. Then the shallow keys of the tree's nodes are moved into the tree's order, and the deep layers run over
root and nodes from the shallow states. What was drafted and is not in the tree is never verified, so never emitted.

    cache of a sequence, shallow layers:   past | root | drafted nodes, level by level | nodes run at verification
    after the move, all layers:            past | root | nodes of the tree, in its order

Which drafted row a node is follows from its parent's row and its token, so a drafter may reorder, drop and add nodes.
Steps in which nobody drafts take the whole pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.decode.passes import Passes, block
from sstf.methods.base import ShallowRows
from sstf.targets import LayerTaps, SplitDecoder, Target
from sstf.trees import behind, pass_tail
from sstf.types import DraftTree


@dataclass
class _Drafted:
    """The rows run since the step began; lists have one entry a level, [batch, width ..]."""

    slots: list[int]
    past: list[int]
    tail: Tensor  # [batch, width, rows] which rows those of the last level see
    tokens: list[Tensor] = field(default_factory=list)
    above: list[Tensor] = field(default_factory=list)  # rows of the parents, -1 above the root
    states: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    rows: int = 0


@dataclass(frozen=True)
class _Layout:
    """Which shallow row each row of a verify pass is, by sequence: drafted ones, and behind them those to be run."""

    rows: list[list[int]]
    missing: list[list[int]]  # rows of the verify pass, in the order in which they are to be run


class LayeredPasses(Passes):
    """`Passes`, and the `ShallowPasses` of a drafter."""

    def __init__(self, target: Target, split: SplitDecoder, taps: LayerTaps | None, slots: int, capacity: int) -> None:
        super().__init__(target, taps, slots, capacity)
        self.split = split
        self._drafted: _Drafted | None = None

    # ---- drafting ---------------------------------------------------------------------------------------------------

    def root(self, slots: Sequence[int], past: Sequence[int], tokens: Sequence[int]) -> ShallowRows:
        """See `ShallowPasses.root`."""
        device = self.target.device
        alone = torch.ones(len(slots), 1, 1, dtype=torch.bool, device=device)
        self._drafted = _Drafted(list(slots), list(past), alone)
        positions = torch.tensor([[length] for length in past], device=device)
        ids = torch.tensor([[token] for token in tokens], device=device)
        return self._run_level(self._drafted, ids, torch.full_like(ids, -1), positions)

    def descend(self, parents: Tensor, tokens: Tensor) -> ShallowRows:
        """See `ShallowPasses.descend`."""
        drafted = self._drafted
        assert drafted is not None, "descend without a root"
        first = drafted.rows - drafted.tail.shape[1]  # row of the last level's first node
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        seen = drafted.tail.gather(1, parents[..., None].expand(-1, -1, drafted.rows))
        drafted.tail = torch.cat([seen, own], -1)
        positions = drafted.positions[-1].gather(1, parents) + 1
        return self._run_level(drafted, tokens, parents + first, positions.clamp_max(self.target.context - 1))

    def _run_level(self, drafted: _Drafted, ids: Tensor, above: Tensor, positions: Tensor) -> ShallowRows:
        width = ids.shape[1]
        starts = torch.tensor([[length + drafted.rows] for length in drafted.past], device=ids.device)
        places = starts + torch.arange(width, device=ids.device)
        drafted.positions.append(positions)
        mask = behind(drafted.tail, drafted.past, max(drafted.past) + drafted.rows + width)
        states = self._run_shallow(drafted.slots, drafted.past, ids, places, torch.cat(drafted.positions, 1), mask)
        drafted.tokens.append(ids)
        drafted.above.append(above)
        drafted.states.append(states)
        drafted.rows += width
        return ShallowRows(states, positions, places, mask)

    def _run_shallow(
        self, slots: Sequence[int], past: Sequence[int], ids: Tensor, places: Tensor, behind_past: Tensor, mask: Tensor
    ) -> Float[Tensor, "batch width hidden"]:
        """Rows `ids` at `places`; `behind_past` has the positions of all rows behind the past, the new ones last."""
        positions = behind_past[:, -ids.shape[1] :]
        if self.slots == 1:
            self.cache.write_behind(past[0] + behind_past.shape[1] - ids.shape[1])
        else:
            self.cache.write_rows(torch.tensor(slots, device=ids.device), places, mask.shape[-1], block(slots))
        return self.split.shallow(ids, positions, self._form(mask, positions, past, behind_past), self.cache)

    # ---- verification -----------------------------------------------------------------------------------------------

    def verify(
        self, slots: Sequence[int], past: Sequence[int], roots: Sequence[int], trees: Sequence[DraftTree]
    ) -> tuple[Float[Tensor, "batch rows vocab"], Float[Tensor, "batch rows taps"]]:
        """See `Passes.verify`. After drafting, the features are the states between the two parts."""
        drafted, self._drafted = self._drafted, None
        if drafted is None:
            return super().verify(slots, past, roots, trees)
        ids, positions, within = self._rows(past, roots, trees)
        tail = pass_tail(within)
        layout = _find(drafted, slots, trees)
        states = self._complete(drafted, layout, slots, past, ids, positions, tail)
        rows = ids.shape[1]
        where = torch.tensor([[length] for length in past], device=ids.device) + torch.arange(rows, device=ids.device)
        if self.slots == 1:
            self.cache.write_behind(past[0])
        else:
            self.cache.write_rows(torch.tensor(slots, device=ids.device), where, max(past) + rows, block(slots))
        mask = behind(tail, past, max(past) + rows)
        hidden = self.split.deep(states, positions, self._form(mask, positions, past, positions), self.cache)
        return self._logits(hidden), states

    def _complete(
        self, drafted: _Drafted, layout: _Layout, slots: Sequence[int], past: Sequence[int], ids: Tensor,
        positions: Tensor, tail: Tensor,
    ) -> Float[Tensor, "batch rows hidden"]:  # fmt: skip
        """The shallow states of all rows, whose keys lie in their order then."""
        device, (batch, rows) = ids.device, ids.shape
        states, before = torch.cat(drafted.states, 1), torch.cat(drafted.positions, 1)
        if len(drafted.slots) < batch:
            index = torch.tensor([list(slots).index(slot) for slot in drafted.slots], device=device)
            states = states.new_zeros(batch, *states.shape[1:]).index_copy_(0, index, states)
            before = before.new_zeros(batch, before.shape[1]).index_copy_(0, index, before)
        order = torch.tensor([[*row, *[0] * (rows - len(row))] for row in layout.rows], device=device)
        if width := max(map(len, layout.missing)):
            # Padding runs the root once more, behind all that anybody sees.
            missing = torch.tensor([[*row, *[0] * (width - len(row))] for row in layout.missing], device=device)
            total = drafted.rows + width
            # Two rows may be one, where the same child was drawn twice.
            seen = torch.zeros(batch, rows, total, dtype=torch.int64, device=device)
            seen = seen.scatter_add_(2, order[:, None].expand(-1, rows, -1), tail.long()) > 0
            mask = behind(seen.gather(1, missing[..., None].expand(-1, -1, total)), past, max(past) + total)
            starts = torch.tensor([[length + drafted.rows] for length in past], device=device)
            places = starts + torch.arange(width, device=device)
            at = torch.cat([before, positions.gather(1, missing)], 1)
            new = self._run_shallow(slots, past, ids.gather(1, missing), places, at, mask)
            states = torch.cat([states, new], 1)
        if any(row != list(range(len(row))) for row in layout.rows):  # else they lie where they belong
            rows_of = torch.tensor(slots, device=device) if self.slots > 1 else torch.zeros(1, dtype=torch.int64)
            self.cache.keep_rows(rows_of.to(device), torch.tensor(past, device=device), order, self.split.layers)
        return states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))


def _find(drafted: _Drafted, slots: Sequence[int], trees: Sequence[DraftTree]) -> _Layout:
    tokens, above = (torch.cat(parts, 1).tolist() for parts in (drafted.tokens, drafted.above))
    found = _Layout([], [])
    for slot, tree in zip(slots, trees, strict=True):
        known: dict[tuple[int, int], int] = {}
        rows: list[int] = []
        missing: list[int] = []
        if slot in drafted.slots:
            i = drafted.slots.index(slot)
            for row, key in enumerate(zip(above[i], tokens[i], strict=True)):
                known.setdefault(key, row)
            rows.append(0)
        else:
            rows.append(drafted.rows)
            missing.append(0)
        for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
            key = (rows[parent + 1], token)
            if key in known:
                rows.append(known[key])
            else:
                rows.append(drafted.rows + len(missing))
                missing.append(node + 1)
        found.rows.append(rows)
        found.missing.append(missing)
    return found


def open_passes(
    target: Target, split: SplitDecoder | None, taps: LayerTaps | None, slots: int, capacity: int
) -> Passes:
    """Passes in layers where the target was split."""
    return LayeredPasses(target, split, taps, slots, capacity) if split else Passes(target, taps, slots, capacity)
