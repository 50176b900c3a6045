"""The seam: what a drafting method must offer. Everything else in the project sees methods only through this.

A method without parameters implements `DraftMethod`; one that is trained implements `TrainableMethod`. To add one:
a file here, a line in `METHODS`, a test, a config, a paragraph of docs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sstf.features.spec import FeatureSpec
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import Chain, DynamicTree
from sstf.types import DraftTree, FeatureBatch, StepOutput


class Drafter(Protocol):
    """Drafts for ONE sequence; holds that sequence's state (caches, history)."""

    def propose(
        self,
        features: Float[Tensor, "seq taps"],
        tokens: Int[Tensor, "seq"],
        policy: Chain | DynamicTree,
    ) -> DraftTree:
        """Take in what was emitted since the last call and draft what may follow its last token.

        Args:
            features: target features of the positions BEFORE `tokens`: row j belongs to the position that predicted
                `tokens[j]` (taps is 0 for a method that reads none).
            tokens: newly emitted target ids; on the first call, the prompt from its second token on, and the first
                emitted token.
            policy: how much to draft.
        """


@runtime_checkable
class DraftMethod(Protocol):
    """A way to propose continuations."""

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """Which target layers it reads. Raises ConfigError when the target lacks them."""

    def drafter(self, head: nn.Module | None, device: torch.device) -> Drafter:
        """A drafter for a new sequence."""


@runtime_checkable
class TrainableMethod(DraftMethod, Protocol):
    """A method with a head to train."""

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Int[Tensor, "draft_vocab"]) -> nn.Module:
        """A new head, initialised under torch's current seed."""

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Summed loss and counts of one batch."""
