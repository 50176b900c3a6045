"""Configuration of the training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sstf.config_loading import Section
from sstf.tracking import TrackerName
from sstf.train.optim import AdamWConfig, MuonConfig
from sstf.train.schedule import ScheduleConfig


class RealDecodeConfig(Section):
    """Every `every` steps, decode the beginnings of `prompts` held-out conversations with the target and the head."""

    every: int = Field(default=500, ge=1)
    prompts: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=64, ge=2)


def _kind(optimizer: Any) -> str:
    """AdamW unless named, so that a learning rate can be given alone."""
    return str(optimizer.get("kind", "adamw") if isinstance(optimizer, dict) else getattr(optimizer, "kind", ""))


_Optimizer = Annotated[Annotated[AdamWConfig, Tag("adamw")] | Annotated[MuonConfig, Tag("muon")], Discriminator(_kind)]


class TrainConfig(Section):
    """Give `epochs` or `steps`, not both. `optimizer` names the kind and its settings, `precision` is that of forward
    and backward; weights and moments are float32. `validation_conversations` are held out, to choose the best head.

    An optimiser step takes whole conversations of up to `step_tokens` tokens, over ALL processes. `batch_tokens` is how
    many of them one process computes at once (`auto`: as many as its memory holds); it changes rounding only.

    `draft_vocab` says what puts a token into the draft vocabulary: how often it is trained, or how much of the target's
    probability would be lost without it (see `features.vocabulary`). `ema` is the decay of averaged weights, which are
    then what is validated and kept. `feature_noise` is the deviation of noise on the target's features, as a share of
    their own size.

    `warm_start` takes weights and draft vocabulary of a finished head, `resume_from` everything from the newest
    checkpoint of another training folder. `patience` ends training after so many choices without a better head.

    `parity` takes the finished head up the ladder of `sstf parity`, with the target in memory; off, where the machine
    that trains cannot hold it.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    step_tokens: int = Field(default=1024, ge=16)
    batch_tokens: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    draft_vocab: Literal["frequency", "mass"] = "frequency"
    optimizer: _Optimizer = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: float | None = Field(default=None, gt=0, lt=1)
    clip: float = Field(default=0.5, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    feature_noise: float = Field(default=0.0, ge=0, lt=1)
    warm_start: Path | None = None
    resume_from: Path | None = None
    validation_conversations: int = Field(default=16, ge=0)
    validate_every: int = Field(default=100, ge=1)
    real_decode: RealDecodeConfig | None = None
    patience: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    trackers: tuple[TrackerName, ...] = ()
    parity: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            found = "both" if self.epochs is not None else "neither"
            raise ValueError(f"give either epochs or steps: {found} found")
        if self.warm_start and self.resume_from:
            raise ValueError("give either warm_start or resume_from: both found")
        if self.real_decode and self.real_decode.every % self.validate_every:
            raise ValueError(
                f"real_decode.every is {self.real_decode.every}; expected a multiple of validate_every "
                f"({self.validate_every})"
            )
        if (self.real_decode or self.patience) and not self.validation_conversations:
            raise ValueError("real_decode and patience need held-out text: validation_conversations is 0")
        return self
