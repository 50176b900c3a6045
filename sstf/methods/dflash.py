"""DFlash (arXiv 2602.06036): a small bidirectional head fills in a whole block of drafts in one pass.

The block is the last emitted token and `block_size` - 1 masks; mask k becomes the k-th draft. A block costs one pass
however long it is, but its drafts do not know of each other: each is the best guess at its place.

Loss: sum over blocks and drafts of weight * objective against the target. The paper's objective is cross entropy with
the text's token; here the label is the target's own most likely one, which is what greedy verification compares with.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sstf.heads import BlockHead
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


class DFlashConfig(BlockConfig):
    """See `BlockConfig`. `block_size` counts the anchor: one fewer are drafted."""

    kind: Literal["dflash"] = "dflash"


class DFlashMethod(BlockMethod):
    """A `TrainableMethod`."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        self.config = config

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> BlockHead:
        """A new head, random but for its final norm."""
        shape = block_shape(self.config, target, first_slot=self.first_slot)
        mask_token = mask_token_of(self.config, frozen.embeddings)
        head = BlockHead(shape, frozen.embeddings, frozen.lm_head, draft_tokens, mask_token)
        initialise(head, frozen)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """See the module docstring."""
        assert isinstance(head, BlockHead)
        drafts = Judged(head, batch, frozen, self.config.anchors, self.loss_rows)
        found = drafts.distill(self.config.objective, drafts.weights(self.config.weights))
        return drafts.output(found.loss_sum, found)

    def drafter(self, head: nn.Module | None, device: torch.device) -> BlockDrafter:
        """See `BlockDrafter`."""
        assert isinstance(head, BlockHead)
        return BlockDrafter(head)
