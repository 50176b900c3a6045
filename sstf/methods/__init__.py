"""Drafting methods behind one seam (`base.py`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sstf.methods.base import Drafter, DraftMethod, TrainableMethod
from sstf.methods.eagle3 import Eagle3Config, Eagle3Method
from sstf.methods.early_exit import EarlyExitConfig, EarlyExitMethod
from sstf.methods.ngram import NgramConfig, NgramMethod

MethodConfig = Annotated[Eagle3Config | EarlyExitConfig | NgramConfig, Field(discriminator="kind")]

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "eagle3": (Eagle3Config, Eagle3Method),
    "early_exit": (EarlyExitConfig, EarlyExitMethod),
    "ngram": (NgramConfig, NgramMethod),
}


def build_method(config: Eagle3Config | EarlyExitConfig | NgramConfig) -> DraftMethod:
    """The method that a configuration describes."""
    method: DraftMethod = METHODS[config.kind][1](config)
    return method


__all__ = [
    "METHODS",
    "DraftMethod",
    "Drafter",
    "Eagle3Config",
    "EarlyExitConfig",
    "MethodConfig",
    "NgramConfig",
    "TrainableMethod",
    "build_method",
]
