"""Prompt lookup: the continuation of the last place where the sequence's latest n tokens stood before.

Needs no training, so it is the free baseline that every head must beat (as in transformers' `prompt_lookup_num_tokens`
and vLLM's `ngram` method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from sstf.config_loading import Section
from sstf.features.spec import FeatureSpec
from sstf.methods.base import DraftLimits, News, ShallowPasses
from sstf.targets import TargetSpec
from sstf.trees import AnyTree, DraftContext
from sstf.types import DraftTree


class NgramConfig(Section):
    """Matches of `max_n` tokens are tried first, then shorter ones down to `min_n`."""

    kind: Literal["ngram"] = "ngram"
    reads: ClassVar[tuple[str, ...]] = ()
    min_n: int = Field(default=2, ge=1)
    max_n: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> NgramConfig:
        if self.min_n > self.max_n:
            raise ValueError(f"min_n is {self.min_n}, expected at most max_n, which is {self.max_n}")
        return self


class NgramMethod:
    """A `DraftMethod` without parameters."""

    def __init__(self, config: NgramConfig) -> None:
        self.config = config

    @property
    def limits(self) -> DraftLimits:
        """Chains."""
        return DraftLimits(trees=False)

    @property
    def shared_layers(self) -> int:
        """None: it reads tokens alone."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """No layers: it reads tokens alone."""
        return FeatureSpec()

    def drafter(self, head: nn.Module | None, device: torch.device) -> NgramDrafter:
        """A drafter with empty histories."""
        return NgramDrafter(self.config, device)


class NgramDrafter:
    """Proposes a chain of at most `policy.depth` and `policy.total_tokens` tokens; nothing where nothing matches."""

    levels = 0  # no draft passes

    def __init__(self, config: NgramConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.histories: list[History] = []

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`."""
        self.histories = [History(self.config) for _ in range(slots)]

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.histories[slot] = History(self.config)

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        room = min(policy.depth, policy.total_tokens, context.depth)
        found = []
        for one in news:
            self.histories[one.slot].extend(one.tokens)
            found.append(chain(self.histories[one.slot].lookup().tokens[:room], self.device))
        return found


@dataclass(frozen=True)
class Match:
    """A continuation found in the text; `n` tokens before it matched (0: nothing was found)."""

    n: int
    tokens: list[int]


class History:
    """The tokens of one sequence and, for every n-gram seen, where it last ended: a lookup reads a dictionary."""

    def __init__(self, config: NgramConfig) -> None:
        self.config = config
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind it

    def extend(self, tokens: Sequence[int]) -> None:
        """Append emitted tokens."""
        for token in tokens:
            # Indexed before the token joins: an n-gram is worth finding only once something stands behind it.
            for n in range(self.config.min_n, self.config.max_n + 1):
                if len(self.tokens) >= n:
                    self.ends[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def lookup(self) -> Match:
        """What followed the latest place where the last tokens stood before, the longest match first."""
        for n in range(self.config.max_n, self.config.min_n - 1, -1):
            start = self.ends.get(tuple(self.tokens[-n:])) if len(self.tokens) >= n else None
            if start is not None:
                return Match(n, self.tokens[start : start + 64])
        return Match(0, [])


def chain(tokens: list[int], device: torch.device, confidence: float | None = None) -> DraftTree:
    """A tree of one path."""
    nodes = torch.tensor(tokens, dtype=torch.int64, device=device)
    chances = None if confidence is None else torch.full((len(tokens),), confidence, device=device)
    return DraftTree(nodes, torch.arange(-1, len(tokens) - 1, device=device), chances)
