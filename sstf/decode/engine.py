"""Speculative decoding of one sequence over a stock transformers model.

Every step: draft a tree, run the target once over the last emitted token and the tree (a 4-D mask shows each node
its ancestors only), keep the accepted branch, emit it and the bonus token. Without a head the tree is empty and the
same loop is plain decoding, so baseline and speculation differ in nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sstf.decode.verify import Verified, draw, verify_deterministic, verify_greedy
from sstf.errors import DecodeError
from sstf.methods.base import Drafter
from sstf.methods.checkpoint import DraftHead
from sstf.targets import LayerTaps, PreallocatedCache, Target
from sstf.trees import Chain, DynamicTree, ancestor_mask, depths
from sstf.types import DraftTree
from sstf.warping import warp


@dataclass(frozen=True)
class Timings:
    """Seconds. `decode` covers everything after the prefill; `draft` and `verify` are parts of it."""

    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0
    verify: float = 0.0


@dataclass(frozen=True)
class Generation:
    """`token_ids` are the new tokens, an end token included.

    `accepted_lengths` has one entry a verify pass: tokens it emitted, the bonus token included. The first token
    comes from the prefill, so their sum is `len(token_ids) - 1`.
    """

    token_ids: list[int]
    accepted_lengths: list[int]
    timings: Timings = field(default_factory=Timings)

    @property
    def accepted_length(self) -> float:
        """Mean tokens per verify pass (0 when one token was all)."""
        return sum(self.accepted_lengths) / len(self.accepted_lengths) if self.accepted_lengths else 0.0


class SpeculativeDecoder:
    """Decodes with `target`, drafting with `head` in the shape of `policy`; `head=None` decodes plainly."""

    def __init__(self, target: Target, head: DraftHead | None, policy: Chain | DynamicTree | None = None) -> None:
        self.target, self.head = target, head
        self.policy = policy or Chain()
        self.layers = head.method.feature_spec(target.spec).layers if head else ()

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Sequence[int] | Tensor,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Continue a prompt until an end token or `max_new_tokens`.

        Args:
            input_ids: [seq] or [1, seq] token ids.
            max_new_tokens: at most so many.
            temperature: 0 is greedy.
            top_p: nucleus sampling, in (0, 1].
            seed: of the generator that sampling draws from.
            on_tokens: called with each pass's tokens, for streaming.

        Raises:
            DecodeError: a value out of range, a prompt that is empty or too long, or logits that are not finite.
        """
        prompt = self._check(input_ids, max_new_tokens, temperature, top_p)
        budget = self.policy.total_tokens if self.head else 0
        sampler = _Sampler(temperature, top_p, torch.Generator().manual_seed(seed))
        cache = self.target.new_cache(len(prompt) + max_new_tokens + budget + 1)
        drafter = self.head.method.drafter(self.head.module, self.target.device) if self.head else None
        with self.target.tap(self.layers) as taps:
            run = _Run(self.target, taps, bool(self.layers), drafter, self.policy, cache, sampler)
            return run.generate(prompt, max_new_tokens, on_tokens)

    def _check(
        self, input_ids: Sequence[int] | Tensor, max_new_tokens: int, temperature: float, top_p: float
    ) -> list[int]:
        ids = torch.as_tensor(input_ids, dtype=torch.int64)
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        context = self.target.context
        if ids.ndim != 1 or len(ids) < 1:
            raise DecodeError(f"input_ids has shape {list(ids.shape)}; expected one sequence of at least one token")
        if max_new_tokens < 1:
            raise DecodeError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        if len(ids) + max_new_tokens > context:
            raise DecodeError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, together more than the "
                f"target's context of {context}; shorten one of them"
            )
        if not (temperature >= 0 and temperature < float("inf")):
            raise DecodeError(f"temperature is {temperature}; expected 0 (greedy) or above")
        if not 0 < top_p <= 1:
            raise DecodeError(f"top_p is {top_p}; expected a value in (0, 1]")
        if int(ids.min()) < 0 or int(ids.max()) >= self.target.spec.vocab_size:
            raise DecodeError(f"input_ids holds ids outside the target's vocabulary of {self.target.spec.vocab_size}")
        tokens: list[int] = ids.tolist()
        return tokens


@dataclass(frozen=True)
class _Sampler:
    """Turns target logits into tokens, by the one temperature for drafted and bonus tokens alike."""

    temperature: float
    top_p: float
    generator: torch.Generator

    def first(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax(-1))
        return draw(warp(logits, self.temperature, self.top_p), self.generator)

    def verify(self, tree: DraftTree, logits: Tensor) -> Verified:
        if self.temperature == 0:
            return verify_greedy(tree, logits.argmax(-1).tolist())
        return verify_deterministic(tree, warp(logits, self.temperature, self.top_p), self.generator)


@dataclass
class _Run:
    """The state of one `generate` call."""

    target: Target
    taps: LayerTaps
    tapped: bool
    drafter: Drafter | None
    policy: Chain | DynamicTree
    cache: PreallocatedCache
    sampler: _Sampler

    def generate(
        self, prompt: list[int], max_new_tokens: int, on_tokens: Callable[[list[int]], None] | None
    ) -> Generation:
        device = self.target.device
        started = self._now()
        ids = torch.tensor(prompt, device=device)
        logits = self._forward(ids, torch.arange(len(prompt), device=device), None, last_only=True)
        self.cache.advance(len(prompt))
        features = self._features(len(prompt))
        emitted = [self.sampler.first(logits[0])]
        if on_tokens:
            on_tokens(list(emitted))
        fresh = torch.cat([ids[1:], torch.tensor(emitted, device=device)])
        prefilled = self._now()
        lengths: list[int] = []
        draft_s = verify_s = 0.0
        while len(emitted) < max_new_tokens and emitted[-1] not in self.target.end_tokens:
            t0 = self._now()
            tree = self._draft(features, fresh, max_new_tokens - len(emitted))
            t1 = self._now()
            verified = self._verify(emitted[-1], tree)
            kept = torch.tensor([0, *(node + 1 for node in verified.nodes)], device=device)
            features = self._features(len(tree) + 1)[kept]
            if verified.nodes == list(range(len(verified.nodes))):  # they lie where they belong: always so in a chain
                self.cache.advance(len(kept))
            else:
                self.cache.keep(kept)
            new = self._cut([*verified.tokens, verified.bonus], max_new_tokens - len(emitted))
            fresh = torch.tensor([*verified.tokens, verified.bonus], device=device)
            emitted += new
            lengths.append(len(new))
            if on_tokens:
                on_tokens(new)
            draft_s += t1 - t0
            verify_s += self._now() - t1
        ended = self._now()
        return Generation(emitted, lengths, Timings(prefilled - started, ended - prefilled, draft_s, verify_s))

    def _draft(self, features: Tensor, fresh: Tensor, room: int) -> DraftTree:
        """At most `room` - 1 tokens deep: the bonus token takes the last place, and the context may end there."""
        if self.drafter is None or room == 1:
            return DraftTree.empty(self.target.device)
        depth = min(self.policy.depth, room - 1)
        return self.drafter.propose(features, fresh, self.policy.model_copy(update={"depth": depth}))

    def _verify(self, root: int, tree: DraftTree) -> Verified:
        past, count, device = self.cache.length, len(tree) + 1, self.target.device
        mask = torch.ones(count, past + count, dtype=torch.bool, device=device)
        positions = torch.full((count,), past, device=device)
        if len(tree):
            within = ancestor_mask(tree.parents)
            positions[1:] += depths(within)
            mask[0, past + 1 :] = False  # the root sees no node; every node sees the root
            mask[1:, past + 1 :] = within
        ids = torch.cat([torch.tensor([root], device=device), tree.tokens])
        return self.sampler.verify(tree, self._forward(ids, positions, mask))

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, last_only: bool = False) -> Tensor:
        """Logits [seq, vocab] float32, or of the last position only."""
        hidden = self.target.decoder(
            ids[None],
            attention_mask=None if mask is None else self.target.mask(mask[None, None]),
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0]
        logits = self.target.frozen_head.logits(hidden[-1:] if last_only else hidden)
        bad = ~logits.amax(-1).isfinite()  # NaN if any entry of the row is
        if bool(bad.any()):
            row = int(bad.nonzero()[0]) if not last_only else len(ids) - 1
            raise DecodeError(
                f"the target returned NaN or infinite logits at position {int(positions[row])}; "
                "check its weights and dtype"
            )
        return logits

    def _features(self, rows: int) -> Tensor:
        """Target features of the last pass, [rows, taps]; taps is 0 for a method that reads none."""
        return self.taps.features()[0] if self.tapped else torch.empty(rows, 0, device=self.target.device)

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """Nothing after an end token or past the limit is emitted."""
        tokens = tokens[:room]
        for i, token in enumerate(tokens):
            if token in self.target.end_tokens:
                return tokens[: i + 1]
        return tokens

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()
