"""A drafter and prompt lookup in one tree: continuations found in the text itself join as extra branches.

A head guesses what is likely, lookup what stood there before; where a text repeats itself (names, code, quotations)
lookup reaches much deeper and costs nothing. How far a continuation is worth verifying is learned: for every length
of match the share of its tokens that were right, with exponential forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sstf.methods import Drafter, NgramConfig
from sstf.methods.base import News, ShallowPasses
from sstf.methods.ngram import History, Match, chain
from sstf.trees import AnyTree, DraftContext, union
from sstf.types import DraftTree

LONGEST = 24  # tokens of a continuation
WORTH = 0.2  # a continuation ends where its next token would be reached with less than this chance
RATE = 0.05  # weight of the newest continuation
NOT_THE_HEADS = -1.0  # in place of the head's confidence, from which calibration learns, in what lookup found


@dataclass
class Record:
    """How continuations found with one length of match have fared."""

    tokens: float = 4.0  # tried, that is up to and with the first wrong one; a prior to start from
    right: float = 3.0

    @property
    def chance(self) -> float:
        """That the next token of a continuation is right; above 0."""
        return max(self.right, 1e-6) / self.tokens

    @property
    def length(self) -> int:
        """How many tokens to verify. At least one: what is never tried again would never recover."""
        return min(LONGEST, max(1, int(math.log(WORTH) / math.log(self.chance)))) if self.chance < 1 else LONGEST

    def add(self, right: int, offered: int) -> None:
        """Learn from a continuation of which the first `right` tokens came true."""
        self.tokens = self.tokens * (1 - RATE) + min(right + 1, offered)
        self.right = self.right * (1 - RATE) + right


class HybridDrafter:
    """Drafts with `first`; where the policy says `lookup`, adds what the text itself offers."""

    def __init__(self, first: Drafter, device: torch.device, config: NgramConfig | None = None) -> None:
        self.first, self.device = first, device
        self.config = config or NgramConfig()
        self.records = {n: Record() for n in range(self.config.min_n, self.config.max_n + 1)}
        self.histories: list[History] = []
        self.offers: list[Match] = []  # the last of each slot

    @property
    def levels(self) -> int:
        """See `Drafter.levels`."""
        return self.first.levels

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`. What was learned stays."""
        self.first.start(slots, capacity, passes)
        self.histories = [History(self.config) for _ in range(slots)]
        self.offers = [Match(0, [])] * slots

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.first.restart(slot)
        self.histories[slot], self.offers[slot] = History(self.config), Match(0, [])

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        trees = self.first.propose(news, policy, context)
        for i, one in enumerate(news):
            self._learn(self.offers[one.slot], one.tokens)
            history = self.histories[one.slot]
            history.extend(one.tokens)
            self.offers[one.slot] = Match(0, [])
            if policy.lookup:
                found = history.lookup()
                offer = Match(found.n, found.tokens[: min(self._length(found), context.depth)])
                self.offers[one.slot] = offer
                trees[i] = union(trees[i], chain(offer.tokens, self.device, NOT_THE_HEADS))
        return trees

    def _length(self, found: Match) -> int:
        return self.records[found.n].length if found.n else 0

    def _learn(self, offer: Match, emitted: list[int]) -> None:
        if offer.tokens:
            # The pass may have been cut short: what it never came to is not counted.
            pairs = list(zip(offer.tokens, emitted, strict=False))
            right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            self.records[offer.n].add(right, len(pairs))
