"""Configuration of the training stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.tracking import TrackerName


class TrainConfig(Section):
    """Give `epochs` or `steps`, not both.

    A micro-batch holds at most `batch_tokens` tokens, padding included; an optimiser step takes `batches_per_step`
    micro-batches over ALL processes, so a run means the same on any number of them that divides it.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=1024, ge=16)
    batches_per_step: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    warmup_share: float = Field(default=0.015, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: float = Field(default=0.5, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    validation_conversations: int = Field(default=16, ge=0)
    validate_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    trackers: tuple[TrackerName, ...] = ()

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            found = "both" if self.epochs is not None else "neither"
            raise ValueError(f"give either epochs or steps: {found} found")
        return self
