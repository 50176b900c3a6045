"""The learning rate over a run, as a share of its peak: a pure function of the step, so there is no state to resume.

Linear warm-up, and then one of

    cosine     half a cosine from the peak to `final`
    linear     a line from the peak to `final`
    constant   the peak
    wsd        the peak, and over the last `decay_share` of the run down to `final` (warm-up, stable, decay:
               MiniCPM, arXiv 2404.06395); `decay` is the line, or 1 - sqrt of arXiv 2405.18392, which falls
               quicker at first
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.errors import ConfigError


class ScheduleConfig(Section):
    """Warm-up takes `warmup_share` of the run, or `warmup_steps` where given; `final` is a share of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_share: float = Field(default=0.015, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=1)
    final: float = Field(default=0.0, ge=0, le=1)
    decay_share: float = Field(default=0.1, gt=0, le=1)
    decay: Literal["linear", "sqrt"] = "linear"

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> ScheduleConfig:
        readers = {"final": ("cosine", "linear", "wsd"), "decay_share": ("wsd",), "decay": ("wsd",)}
        for name, kinds in readers.items():
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.kind not in kinds:
                raise ValueError(f"{name} is read by {', '.join(kinds)} but kind is {self.kind}; remove it")
        return self


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate, in [0, 1], at 0-based `step` of a run of `steps`.

    Warm-up ends at the peak and what follows starts there; the step after the last one would be at `final`.

    >>> [round(factor(ScheduleConfig(warmup_share=0.5), step, 8), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146]
    >>> wsd = ScheduleConfig(kind="wsd", warmup_steps=2, decay_share=0.5)
    >>> [factor(wsd, step, 8) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if config.kind == "wsd":
        start = max(warmup, steps - round(steps * config.decay_share))
    done = max(0.0, (step - start) / max(1, steps - start))  # of the descent, in [0, 1)
    if config.kind == "constant":
        share = 1.0
    elif config.kind == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif config.kind == "wsd" and config.decay == "sqrt":
        share = 1 - math.sqrt(done)
    else:
        share = 1 - done
    return config.final + (1 - config.final) * share


def warmup_steps(config: ScheduleConfig, steps: int) -> int:
    """Steps of the warm-up, at least one (which is then at the peak).

    >>> warmup_steps(ScheduleConfig(), 1000), warmup_steps(ScheduleConfig(warmup_share=0), 1000)
    (15, 1)

    Raises:
        ConfigError: it is longer than the run.
    """
    if config.warmup_steps is None:
        return max(1, round(steps * config.warmup_share))
    if config.warmup_steps > steps:
        raise ConfigError(
            f"train.schedule.warmup_steps is {config.warmup_steps} but the run has {steps} steps; lower it, or give "
            "warmup_share"
        )
    return config.warmup_steps
