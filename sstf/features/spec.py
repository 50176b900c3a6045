"""Which hidden states a method reads from the target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureSpec:
    """`layers` are 0-based decoder-layer OUTPUTS, in the order in which they are concatenated.

    Engines write the same choice in other conventions; only the exporters translate. An empty tuple means that the
    method reads nothing but tokens.
    """

    layers: tuple[int, ...] = ()
