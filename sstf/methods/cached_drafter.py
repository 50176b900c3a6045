"""Drafting with heads that keep keys and values: slots, caches, CUDA graphs. Shared by the EAGLE methods.

A cache holds, for each slot, the positions whose features the target computed, and behind them the nodes of the tree
being drafted, which the next call writes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sstf.methods.base import News, ShallowPasses
from sstf.targets import PreallocatedCache
from sstf.targets.graphs import GraphRunner, padded_keys, padded_rows
from sstf.trees import AnyTree, DraftContext, behind, grow
from sstf.types import DraftTree


class FusedHead(Protocol):
    """A head in the form that drafts; see `FusedEagle`, which documents the members."""

    @property
    def layers(self) -> Sequence[object]:
        """Each has a cache of its own."""

    def make_rope(self, capacity: int) -> None:
        """Rotary tables for positions below `capacity`."""

    def fuse(self, features: Tensor) -> Tensor:
        """What the head reads of [batch, seq, taps], [batch, seq, hidden]."""

    def fed_back(self, out: Tensor) -> Tensor:
        """What stands in for `fuse`'s result where the target has not been."""

    def __call__(self, g: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: PreallocatedCache) -> Tensor:
        """[batch, seq, hidden]; keys and values go where `cache` was told to put them."""

    def logits(self, out: Tensor) -> Tensor:
        """Draft logits of outputs."""


class CachedDrafter:
    """Slots and their cache; how trees grow is left to the classes below.

    Args:
        step: the head.
        draft_tokens: [draft_vocab] int64, target ids of the draft vocabulary.
    """

    def __init__(self, step: FusedHead, draft_tokens: Tensor) -> None:
        self.step, self.draft_tokens = step, draft_tokens
        self.lengths: list[int] = []
        self.levels = 0
        self.cache: PreallocatedCache
        self.graphs = GraphRunner(draft_tokens.device) if draft_tokens.device.type == "cuda" else None

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`. A cache that is large enough stays, and with it the graphs over its memory."""
        fits = len(self.lengths) == slots and self.cache.capacity >= capacity
        self.lengths = [0] * slots
        if not fits:
            capacity = -(-capacity // 256) * 256
            self.cache = PreallocatedCache(("attention",) * len(self.step.layers), slots, capacity)
            self.step.make_rope(capacity)
            if self.graphs:
                self.graphs = GraphRunner(self.draft_tokens.device)

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.lengths[slot] = 0

    def take_in(self, news: Sequence[News], more: Sequence[int] = (), g_of_more: Tensor | None = None) -> Tensor:
        """Run the head over what was emitted.

        Args:
            news: of the sequences to draft for.
            more: tokens of rows that are put behind each sequence's own for this call.
            g_of_more: [hidden], what those rows read in place of features.

        Returns:
            [batch, 1 + more, hidden], the output at the last token of each sequence and at the rows behind it.
        """
        new = [i for i, one in enumerate(news) if self.lengths[one.slot] == 0]
        if not new or len(news) == 1:
            return self._take_in_together(news, more, g_of_more)
        # A prompt is much longer than what a pass emits: each on its own, not everything padded to it.
        groups = [[i] for i in new]
        groups += [others] if (others := [i for i in range(len(news)) if i not in new]) else []
        parts = [self._take_in_together([news[i] for i in group], more, g_of_more) for group in groups]
        order = torch.tensor([i for group in groups for i in group], device=self.draft_tokens.device)
        return torch.cat(parts)[order.argsort()]

    def _take_in_together(self, news: Sequence[News], more: Sequence[int], g_of_more: Tensor | None) -> Tensor:
        slots, counts = [one.slot for one in news], [len(one.tokens) for one in news]
        longest, device = max(counts) + len(more), self.draft_tokens.device
        if self.graphs:
            longest = padded_rows(longest) or longest
        past = [self.lengths[slot] for slot in slots]
        rows = [[*one.tokens, *more] for one in news]
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        features = pad_sequence([one.features for one in news], batch_first=True)
        features = F.pad(features, (0, 0, 0, longest - features.shape[1]))
        steps = torch.arange(longest, device=device)
        causal = (steps <= steps[:, None]).expand(len(slots), -1, -1)
        at = torch.tensor(past, device=device)[:, None] + steps
        mask = behind(causal, past, max(past) + longest)
        g = self.step.fuse(features)
        if g_of_more is not None:
            given = torch.tensor(counts, device=device)[:, None] > steps
            g = torch.where(given[..., None], g, g_of_more)
        out = self.forward(slots, g, tokens, at, past, mask)
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        wanted = 1 + len(more)
        if out.shape[:2] == (1, counts[0] + len(more)):
            return out[:, -wanted:]
        last = torch.tensor(counts, device=device)[:, None] - 1 + torch.arange(wanted, device=device)
        return out[torch.arange(len(slots), device=device)[:, None], last]

    def forward(
        self, slots: list[int], g: Tensor, tokens: Tensor, at: Tensor, starts: list[int], mask: Tensor
    ) -> Tensor:
        """The head over [batch, rows], whose keys go behind the first `starts` of their slots."""
        if len(self.lengths) == 1 and not self.graphs:
            self.cache.write_behind(starts[0])
            return self.step(g, tokens, at, mask, self.cache)
        # Padding may reach beyond the end; the last place is never seen and takes it.
        last, mask = self.cache.capacity - 1, mask[..., : self.cache.capacity]
        where = torch.tensor(starts, device=g.device)[:, None] + torch.arange(g.shape[1], device=g.device)
        visible = mask.shape[-1]
        if self.graphs:
            visible = padded_keys(visible, self.cache.capacity)
            mask = F.pad(mask, (0, visible - mask.shape[-1]))
        inputs = {
            "g": g,
            "tokens": tokens,
            "at": at.clamp_max(last),
            "mask": mask,
            "slots": torch.tensor(slots, device=g.device),
            "where": where.clamp_max(last),
        }

        def work(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            self.cache.write_rows(x["slots"], x["where"], visible)
            return (self.step(x["g"], x["tokens"], x["at"], x["mask"], self.cache),)

        if self.graphs and padded_rows(g.shape[1]):
            (out,) = self.graphs((*g.shape[:2], visible), inputs, work)
            return out.clone()  # the next level may run in the same graph
        return work(inputs)[0]


class FeedbackDrafter(CachedDrafter):
    """Drafts level by level: a node reads its own token and the head's output at its parent."""

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        slots = [one.slot for one in news]
        last = self.take_in(news)  # [batch, nodes of the last level, hidden]
        past = [self.lengths[slot] for slot in slots]
        batch, device = len(slots), last.device
        level = nodes = 0
        tail = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)  # ancestors of the last level's nodes

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            nonlocal last, tail, level, nodes
            width = parents.shape[1]
            own = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
            tail = torch.cat([_pick(tail, parents), own], -1)
            at = torch.tensor([[length + level] for length in past], device=device).expand(-1, width)
            fed_back = self.step.fed_back(_pick(last, parents))
            last = self.forward(
                slots, fed_back, self.draft_tokens[draft_ids], at, [length + nodes for length in past],
                behind(tail, past, max(past) + nodes + width),
            )  # fmt: skip
            level, nodes = level + 1, nodes + width
            return self.step.logits(last)

        trees = grow(policy, context, self.step.logits(last[:, 0]), expand, self.draft_tokens)
        self.levels = level + 1
        return trees


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows [batch, width, dim] at index [batch, picked] -> [batch, picked, dim]."""
    if rows.shape[1] == 1:
        return rows.expand(-1, index.shape[1], -1)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
