"""Head and objective as one module: what is trained, and what several processes share."""

from __future__ import annotations

import torch
from torch import nn

from sstf.methods.base import TrainableMethod
from sstf.targets import FrozenHead
from sstf.types import FeatureBatch, StepOutput


class HeadWithLoss(nn.Module):
    """Head and objective as one module, so that DDP and its kin see a single forward whatever the head unrolls.

    Parameters stay float32; under `precision` bf16 the products run in bfloat16. This is not left to accelerate or
    DeepSpeed, which would round what crosses the processes too.
    """

    def __init__(self, method: TrainableMethod, head: nn.Module, frozen: FrozenHead, precision: str) -> None:
        super().__init__()
        self.method, self.head, self.frozen = method, head, frozen
        self.bf16 = precision == "bf16"
        # Buffers are the same everywhere and never change; DDP would send the embeddings around in every forward.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, batch: FeatureBatch) -> StepOutput:
        """Summed loss and counts of one batch."""
        with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=self.bf16):
            return self.method.loss(self.head, batch, self.frozen)
