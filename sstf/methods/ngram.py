"""Prompt lookup: the continuation of the last place where the sequence's latest n tokens stood before.

Needs no training, so it is the free baseline that every head must beat (as in transformers' `prompt_lookup_num_tokens`
and vLLM's `ngram` method).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.features.spec import FeatureSpec
from sstf.targets import TargetSpec
from sstf.trees import Chain, DynamicTree
from sstf.types import DraftTree


class NgramConfig(Section):
    """Matches of `max_n` tokens are tried first, then shorter ones down to `min_n`."""

    kind: Literal["ngram"] = "ngram"
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

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """No layers: it reads tokens alone."""
        return FeatureSpec()

    def drafter(self, head: nn.Module | None, device: torch.device) -> NgramDrafter:
        """A drafter with an empty history."""
        return NgramDrafter(self.config, device)


class NgramDrafter:
    """Keeps, for every n-gram seen, where it last ended; a lookup is a few dictionary reads."""

    def __init__(self, config: NgramConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.history: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind it

    def propose(self, features: Tensor, tokens: Tensor, policy: Chain | DynamicTree) -> DraftTree:
        """A chain of at most `policy.depth` and `policy.total_tokens` tokens, empty when nothing matches."""
        room = min(policy.depth, policy.total_tokens)
        for token in tokens.tolist():
            # Indexed before the token joins: an n-gram is worth finding only once something stands behind it.
            for n in range(self.config.min_n, self.config.max_n + 1):
                if len(self.history) >= n:
                    self.ends[tuple(self.history[-n:])] = len(self.history)
            self.history.append(token)
        for n in range(self.config.max_n, self.config.min_n - 1, -1):
            start = self.ends.get(tuple(self.history[-n:])) if len(self.history) >= n else None
            if start is not None:
                found = torch.tensor(self.history[start : start + room], device=self.device)
                return DraftTree(found, torch.arange(-1, len(found) - 1, device=self.device))
        return DraftTree.empty(self.device)
