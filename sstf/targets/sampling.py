"""Sampling many continuations at once: continuous batching over a fixed number of slots.

A slot whose sequence ends is refilled from the queue, so the batch stays full. Every row draws from its own seeded
generator; what a row says depends on the other rows only through floating-point rounding. For a given list of
prompts and slots the result is the same bit for bit, which is what lets a killed run go on (`data/regenerate.py`
calls it once per group).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sstf.errors import DataError, TargetError
from sstf.heap import trim
from sstf.targets.cache import PreallocatedCache, causal_mask
from sstf.targets.huggingface import Target
from sstf.types import Sampled, SamplingParams
from sstf.warping import warp_top

PREFILL_TOKENS = 4096  # of one prefill pass, padding included: a bound on its memory


@dataclass
class _Slot:
    """One sequence being written."""

    request: int
    params: SamplingParams
    generator: torch.Generator
    length: int  # tokens whose keys and values are in the cache
    written: list[int] = field(default_factory=list)


class BatchSampler:
    """Implements the data layer's `Sampler` protocol with the target in this process."""

    def __init__(self, target: Target) -> None:
        """Raises:
        TargetError: some layers keep a recurrent state, which rows of different lengths cannot share a pass with.
        """
        if target.recurrent:
            raise TargetError(
                f"target {target.spec.name} has layers with a recurrent state, and cannot answer many conversations at "
                "once here; let a server do it (data.answers.engine of kind server)"
            )
        self.target = target
        self._cache: PreallocatedCache | None = None
        self._slots = 0

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        """Continue every prompt until an end token or its `max_new_tokens`.

        Args:
            prompts: token ids, each at least one.
            params: one a prompt; `top_k` must be the same for all.
            slots: sequences decoded at once.
            on_token: called with the number of tokens written since the last call.

        Returns:
            One result a prompt, in order; an end token is part of `token_ids`.

        Raises:
            DataError: an empty prompt, one that leaves no room in the target's context, or nothing to write.
        """
        limit = self.target.context
        for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            if p.max_new_tokens < 1:
                raise DataError(f"prompt {index} has max_new_tokens {p.max_new_tokens}; expected at least 1")
            if not prompt or len(prompt) + p.max_new_tokens > limit:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens; expected between 1 and {limit - p.max_new_tokens} "
                    f"(the target's context of {limit} less max_new_tokens {p.max_new_tokens})"
                )
        if not prompts:
            return []
        slots = min(slots, len(prompts))
        capacity = max(len(prompt) + p.max_new_tokens for prompt, p in zip(prompts, params, strict=True))
        cache = self._room(slots, capacity)
        results: list[Sampled] = [Sampled()] * len(prompts)
        table: list[_Slot | None] = [None] * slots
        waiting = iter(range(len(prompts)))
        left = len(prompts)

        def settle(rows: list[int], logits: Tensor) -> None:
            """Draw one token for each row; free the rows that end."""
            nonlocal left
            active = [slot for slot in (table[row] for row in rows) if slot is not None]
            for row, slot, token in zip(rows, active, self._draw(logits, active), strict=True):
                slot.written.append(token)
                finished = token in self.target.end_tokens
                if finished or len(slot.written) == slot.params.max_new_tokens:
                    results[slot.request] = Sampled(slot.written, finished)
                    table[row] = None
                    left -= 1
            if on_token:
                on_token(len(rows))

        while left:
            free = [row for row, slot in enumerate(table) if slot is None]
            # Prefills come in batches: one at a time would stall all other rows for a single prompt.
            if len(free) >= max(1, slots // 8):
                admitted = list(zip(free, waiting, strict=False))
                if admitted:
                    for row, request in admitted:
                        p = params[request]
                        generator = torch.Generator().manual_seed(p.seed)
                        table[row] = _Slot(request, p, generator, len(prompts[request]))
                    rows = [row for row, _ in admitted]
                    settle(rows, self._prefill(cache, rows, [prompts[request] for _, request in admitted]))
                    continue
            rows = [row for row, slot in enumerate(table) if slot is not None]
            settle(rows, self._step(cache, rows, [slot for slot in table if slot is not None], slots))
        trim()
        return results

    def _room(self, slots: int, capacity: int) -> PreallocatedCache:
        """The cache of the last call where it is large enough: a new one each time leaves holes in the memory."""
        if self._cache is None or self._slots != slots or self._cache.capacity < capacity:
            self._cache = None
            self._cache, self._slots = self.target.new_cache(-(-capacity // 256) * 256, batch=slots), slots
        return self._cache

    def _prefill(self, cache: PreallocatedCache, rows: list[int], prompts: list[Sequence[int]]) -> Tensor:
        """Logits [rows, vocab] after each prompt. Prompts of like length run together: padding costs as text does."""
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
        last: dict[int, Tensor] = {}
        while order:
            group = [order.pop()]  # the longest that is left
            most = max(1, PREFILL_TOKENS // len(prompts[group[0]]))
            while order and len(group) < most and len(prompts[order[-1]]) * 2 > len(prompts[group[0]]):
                group.append(order.pop())
            group.sort()  # the cache takes rows in its own order
            hidden = self._prefill_together(cache, [rows[i] for i in group], [prompts[i] for i in group])
            last |= dict(zip(group, hidden, strict=True))
        return self.target.frozen_head.logits(torch.stack([last[i] for i in range(len(rows))]))

    def _prefill_together(self, cache: PreallocatedCache, rows: list[int], prompts: list[Sequence[int]]) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(longest).expand(len(rows), -1)
        hidden = self._forward(cache, rows, ids, positions, longest)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
        return hidden[torch.arange(len(rows), device=hidden.device), last]

    def _step(self, cache: PreallocatedCache, rows: list[int], active: list[_Slot], slots: int) -> Tensor:
        # With most slots busy all rows run: reading the whole cache as a view is cheaper than gathering rows of it.
        chosen = list(range(slots)) if len(rows) > slots // 2 else rows
        where = {row: i for i, row in enumerate(chosen)}
        ids = torch.zeros(len(chosen), 1, dtype=torch.int64)
        positions = torch.zeros(len(chosen), 1, dtype=torch.int64)
        for row, slot in zip(rows, active, strict=True):
            ids[where[row], 0] = slot.written[-1]
            positions[where[row], 0] = slot.length
            slot.length += 1
        visible = max(slot.length for slot in active)
        hidden = self._forward(cache, chosen, ids, positions, visible)
        picked = hidden[:, 0] if len(chosen) == len(rows) else hidden[[where[row] for row in rows], 0]
        return self.target.frozen_head.logits(picked)

    def _forward(
        self, cache: PreallocatedCache, rows: list[int], ids: Tensor, positions: Tensor, visible: int
    ) -> Tensor:
        device = self.target.device
        positions = positions.to(device)
        cache.write_rows(torch.tensor(rows, device=device), positions, visible)
        output = self.target.decoder(
            ids.to(device),
            attention_mask=self.target.masks(causal_mask(positions, visible), positions),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @staticmethod
    def _draw(logits: Tensor, slots: list[_Slot]) -> list[int]:
        tokens = [0] * len(slots)
        greedy = [i for i, slot in enumerate(slots) if slot.params.temperature == 0]
        drawn = [i for i, slot in enumerate(slots) if slot.params.temperature > 0]
        if greedy:
            rows = logits if not drawn else logits[greedy]
            for i, token in zip(greedy, rows.argmax(-1).tolist(), strict=True):
                tokens[i] = token
        if drawn:
            chosen = [slots[i].params for i in drawn]
            temperature = torch.tensor([[p.temperature] for p in chosen], device=logits.device)
            top_p = torch.tensor([[p.top_p] for p in chosen], device=logits.device)
            probs, ids = warp_top(logits[drawn], temperature, top_p, chosen[0].top_k)
            uniform = torch.stack([torch.rand(1, generator=slots[i].generator) for i in drawn]).to(logits.device)
            # Inverse transform; the last kept token takes what rounding leaves of the cumulative sum.
            cumulative = probs.cumsum(-1)
            rank = (cumulative < uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
            for i, token in zip(drawn, ids.gather(-1, rank)[:, 0].tolist(), strict=True):
                tokens[i] = token
        return tokens
