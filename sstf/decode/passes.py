"""Passes of the target over a batch of slots: prefill, verification of draft trees, and keeping what was accepted.

Row 0 of a verify pass is the last emitted token (the root), row i + 1 is node i. A 4-D mask shows each node the text
and its own ancestors, its position is its depth, and the modules are transformers' own. A target that cannot see a
tree (recurrent layers, flash attention) gets chains, for which its own causal mask is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sstf.targets import LayerTaps, Target
from sstf.targets.graphs import ROWS, GraphRunner, padded_keys, padded_rows
from sstf.trees import ancestor_mask, behind, depths, pass_tail
from sstf.types import DraftTree


class Passes:
    """Runs a target over `slots` sequences of at most `capacity` tokens each, drafted ones included."""

    def __init__(self, target: Target, taps: LayerTaps | None, slots: int, capacity: int) -> None:
        self.target, self.taps = target, taps
        plain_masks = target.takes_trees and not target.masks.by_position
        self.graphs = GraphRunner(target.device) if target.device.type == "cuda" and plain_masks else None
        self.cache = target.new_cache(capacity + ROWS[-1], slots)  # graphs round rows up
        self.slots, self.capacity = slots, capacity
        self.last: Tensor  # ids of the last verify pass

    def prefill(self, slot: int, prompt: Sequence[int]) -> tuple[Float[Tensor, "vocab"], Float[Tensor, "seq taps"]]:
        """Logits behind the prompt, and the features of its positions."""
        ids = torch.tensor([prompt], device=self.target.device)
        positions = torch.arange(len(prompt), device=ids.device)[None]
        mask = None
        if self.slots == 1:
            self.cache.write_behind(0)
            self.cache.forget()
        else:
            self.cache.write_rows(torch.tensor([slot], device=ids.device), positions, len(prompt), block([slot]))
            mask = (positions[:, None] <= positions[..., None]) if self.target.takes_trees else None
        hidden = self._forward(ids, positions, mask)
        return self._logits(hidden[0, -1]), self._features(hidden)[0]

    def verify(
        self, slots: Sequence[int], past: Sequence[int], roots: Sequence[int], trees: Sequence[DraftTree]
    ) -> tuple[Float[Tensor, "batch rows vocab"], Float[Tensor, "batch rows taps"]]:
        """Logits and features of each root and its nodes; smaller trees are padded.

        Args:
            slots: of the sequences, ascending.
            past: tokens of each that the cache holds.
            roots: the last emitted tokens.
            trees: one a sequence.
        """
        device = self.target.device
        ids, positions, within = self._rows(past, roots, trees)
        nodes = ids.shape[1] - 1
        size = padded_rows(nodes + 1)
        if self.graphs and size:
            tail = F.pad(pass_tail(within), (0, size - nodes - 1, 0, size - nodes - 1))
            return self._replayed(self.graphs, slots, past, ids, positions, tail)
        mask = behind(pass_tail(within), past, max(past) + nodes + 1) if self.target.takes_trees else None
        if self.slots == 1:
            self.cache.write_behind(past[0])
            if self.target.recurrent:
                self.states = self.cache.states()
        else:
            where = positions[:, :1] + torch.arange(nodes + 1, device=device)
            self.cache.write_rows(torch.tensor(slots, device=device), where, max(past) + nodes + 1, block(slots))
        self.last = ids
        hidden = self._forward(ids, positions, mask, past)
        return self._logits(hidden), self._features(hidden)

    def _rows(
        self, past: Sequence[int], roots: Sequence[int], trees: Sequence[DraftTree]
    ) -> tuple[Int[Tensor, "batch rows"], Int[Tensor, "batch rows"], Bool[Tensor, "batch node node"]]:
        """Tokens and positions of each root and its nodes, and the nodes' ancestors; smaller trees are padded."""
        device, nodes = self.target.device, max(len(tree) for tree in trees)
        # A padding node is a child of the root with token 0, which nobody sees and nobody reads.
        tokens = _pad([tree.tokens for tree in trees], nodes, 0)
        parents = _pad([tree.parents for tree in trees], nodes, -1)
        ids = torch.cat([torch.tensor([[root] for root in roots], device=device), tokens], 1)
        within = ancestor_mask(parents, depth=nodes)
        starts = torch.tensor([[length] for length in past], device=device)
        positions = torch.cat([starts, starts + depths(within)], 1).clamp_max_(self.target.context - 1)
        return ids, positions, within

    def _replayed(
        self,
        graphs: GraphRunner,
        slots: Sequence[int],
        past: Sequence[int],
        ids: Tensor,
        positions: Tensor,
        tail: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A verify pass of rounded sizes. Rows of padding see the past alone, and nobody sees them."""
        rows, size = ids.shape[1], tail.shape[1]
        visible = padded_keys(max(past) + size, self.cache.capacity)
        starts = torch.tensor([[length] for length in past], device=ids.device)
        inputs = {
            "ids": F.pad(ids, (0, size - rows)),
            "positions": F.pad(positions, (0, size - rows)),
            "mask": behind(tail, past, visible),
            "slots": torch.tensor(slots, device=ids.device),
            "where": starts + torch.arange(size, device=ids.device),
        }

        def work(static: dict[str, Tensor]) -> tuple[Tensor, ...]:
            self.cache.write_rows(static["slots"], static["where"], visible)
            hidden = self._forward(static["ids"], static["positions"], static["mask"])
            return self._logits(hidden), self._features(hidden)

        logits, features = graphs((len(slots), size, visible), inputs, work)
        return logits[:, :rows], features[:, :rows]

    def keep(self, slots: Sequence[int], past: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Of the last pass's rows keep `kept` (ascending, from the root on) behind the past, and nothing else."""
        if self.target.recurrent:
            self._replay(past[0], len(kept[0]))
        elif any(rows != list(range(len(rows))) for rows in map(list, kept)):  # else they lie where they belong
            device = self.target.device
            if self.slots == 1 and not self.graphs:
                self.cache.keep(torch.tensor(kept[0], device=device))
            else:
                longest = max(len(rows) for rows in kept)
                offsets = torch.tensor([[*rows, *[0] * (longest - len(rows))] for rows in kept], device=device)
                self.cache.keep_rows(torch.tensor(slots, device=device), torch.tensor(past, device=device), offsets)

    def _replay(self, past: int, kept: int) -> None:
        """A recurrent state takes no token back: from a copy of the state before the pass, run the kept ones again."""
        if kept < self.last.shape[1]:
            self.cache.restore(self.states)
            self.cache.write_behind(past)
            positions = torch.arange(past, past + kept, device=self.last.device)[None]
            self._forward(self.last[:, :kept], positions, None)

    def _forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, past: Sequence[int] | None = None
    ) -> Float[Tensor, "batch rows hidden"]:
        """The last hidden states, after the final norm. `past` where a mask covers keys from before the pass."""
        form = None if mask is None else self._form(mask, positions, past, positions)
        output = self.target.decoder(
            ids, attention_mask=form, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _form(self, mask: Tensor, queries: Tensor, past: Sequence[int] | None, behind_past: Tensor) -> Any:
        """The mask as the target takes it. Where layers hide keys by their position, these need to be known: key j
        stands at position j, but for those behind the `past` of a sequence, which stand at `behind_past`."""
        keys = None
        if past is not None and self.target.masks.by_position:
            keys = torch.arange(mask.shape[-1], device=mask.device).repeat(len(mask), 1)
            rows = torch.arange(behind_past.shape[1], device=mask.device)
            keys.scatter_(1, torch.tensor(past, device=mask.device)[:, None] + rows, behind_past)
        return self.target.masks(mask, queries, keys)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.target.frozen_head.native_logits(hidden)

    def _features(self, hidden: Tensor) -> Tensor:
        """[batch, rows, taps]; taps is 0 for a method that reads none."""
        return self.taps.features() if self.taps else hidden[..., :0]


def block(slots: Sequence[int]) -> slice | None:
    """Ascending slots as a slice, where they are neighbours."""
    return slice(slots[0], slots[-1] + 1) if slots[-1] - slots[0] == len(slots) - 1 else None


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    if len(rows) == 1:
        return rows[0][None]
    return F.pad(padded := pad_sequence(rows, batch_first=True, padding_value=value), (0, length - padded.shape[1]))


def read(*tensors: Tensor) -> list[list[int]]:
    """Whole numbers from the device, all of them with one read."""
    if tensors[0].device.type == "cpu":
        return [tensor.flatten().tolist() for tensor in tensors]
    flat = [tensor.flatten().to(torch.int64) for tensor in tensors]
    return [part.tolist() for part in torch.cat(flat).cpu().split([len(part) for part in flat])]
