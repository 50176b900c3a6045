"""Which hidden states a method reads from the target, and what is kept of its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sstf.config_loading import Section


@dataclass(frozen=True)
class FeatureSpec:
    """`layers` are 0-based decoder-layer OUTPUTS, in the order in which they are concatenated.

    Engines write the same choice in other conventions; only the exporters translate. An empty tuple means that the
    method reads nothing but tokens.
    """

    layers: tuple[int, ...] = ()


class HiddenSignal(Section):
    """The teacher is the last hidden state: exact but for the codec, `hidden` values a trained token."""

    kind: Literal["hidden"] = "hidden"


class TopKSignal(Section):
    """The teacher is the `k` most likely tokens with their log-probabilities, 4 bytes each (6 from a vocabulary of
    65,537 on): smaller than a hidden state of a large target, and blind to all other tokens."""

    kind: Literal["topk"] = "topk"
    k: int = Field(default=64, ge=1)


TeacherSignal = Annotated[HiddenSignal | TopKSignal, Field(discriminator="kind")]
