"""Drafting methods behind one seam (`base.py`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sstf.methods.base import Drafter, DraftMethod, TrainableMethod
from sstf.methods.eagle import EagleConfig, EagleMethod
from sstf.methods.eagle3 import Eagle3Config, Eagle3Method
from sstf.methods.ngram import NgramConfig, NgramMethod
from sstf.methods.p_eagle import PEagleConfig, PEagleMethod

MethodConfig = Annotated[EagleConfig | Eagle3Config | NgramConfig | PEagleConfig, Field(discriminator="kind")]

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "eagle": (EagleConfig, EagleMethod),
    "eagle3": (Eagle3Config, Eagle3Method),
    "ngram": (NgramConfig, NgramMethod),
    "p_eagle": (PEagleConfig, PEagleMethod),
}


def build_method(config: EagleConfig | Eagle3Config | NgramConfig | PEagleConfig) -> DraftMethod:
    """The method that a configuration describes."""
    method: DraftMethod = METHODS[config.kind][1](config)
    return method


__all__ = [
    "METHODS",
    "DraftMethod",
    "Drafter",
    "Eagle3Config",
    "EagleConfig",
    "MethodConfig",
    "NgramConfig",
    "PEagleConfig",
    "TrainableMethod",
    "build_method",
]
