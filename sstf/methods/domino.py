"""Domino (arXiv 2605.29707): DFlash's block, whose logits a GRU corrects by the tokens drafted before.

One pass fills in the block as in DFlash; then the drafts are chosen from left to right, each behind a small correction
of low rank that has read the anchor and the drafts before it. A tree's nodes are corrected each by its own path.

Loss: (1 - lambda) * that of the corrected drafts + lambda * that of the uncorrected ones, with lambda from 1 at the
start of a training to 0 at its end: the layers learn to stand alone before they learn to be corrected. Training feeds
the text's own tokens. Drafts, slots and positions are DFlash's; SpecForge's published configurations also have blocks
whose slots predict the next position and whose first drafts are not corrected, which are not built here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sstf.heads import DominoHead
from sstf.methods.block import (
    BlockConfig,
    BlockDrafter,
    BlockMethod,
    Judged,
    block_shape,
    initialise,
    mask_token_of,
)
from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch, StepOutput


class DominoConfig(BlockConfig):
    """See `BlockConfig`. `gru_size` is the state's of the GRU and `rank` that of the correction."""

    kind: Literal["domino"] = "domino"
    gru_size: int = Field(default=256, ge=1)
    rank: int = Field(default=256, ge=1)


class DominoMethod(BlockMethod):
    """A `TrainableMethod`."""

    def __init__(self, config: DominoConfig) -> None:
        super().__init__(config)
        self.config = config

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> DominoHead:
        """A new head, random but for its final norm; its correction is nothing yet."""
        config = self.config
        head = DominoHead(
            block_shape(config, target, first_slot=self.first_slot), frozen.embeddings, frozen.lm_head, draft_tokens,
            mask_token_of(config, frozen.embeddings), config.gru_size, config.rank,
        )  # fmt: skip
        initialise(head, frozen)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """See the module docstring. What is reported is of the corrected drafts."""
        assert isinstance(head, DominoHead)
        config = self.config
        drafts = Judged(head, batch, frozen, config.anchors, self.loss_rows)
        low_rank = drafts.of_valid(head.low_rank(drafts.hidden, head.paths(drafts.tokens)))
        weights = drafts.weights(config.weights, low_rank)
        found = drafts.distill(config.objective, weights, low_rank)
        loss = found.loss_sum
        if batch.progress < 1:
            base = drafts.distill(config.objective, weights).loss_sum
            loss = batch.progress * loss + (1 - batch.progress) * base
        return drafts.output(loss, found)

    def drafter(self, head: nn.Module | None, device: torch.device) -> BlockDrafter:
        """See `BlockDrafter`."""
        assert isinstance(head, DominoHead)
        return BlockDrafter(head)
