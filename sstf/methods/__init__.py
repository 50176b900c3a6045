"""Drafting methods behind one seam (`base.py`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sstf.methods.base import Drafter, DraftMethod, TrainableMethod
from sstf.methods.dflash import DFlashConfig, DFlashMethod
from sstf.methods.domino import DominoConfig, DominoMethod
from sstf.methods.dspark import DSparkConfig, DSparkMethod
from sstf.methods.eagle import EagleConfig, EagleMethod
from sstf.methods.eagle3 import Eagle3Config, Eagle3Method
from sstf.methods.medusa import MedusaConfig, MedusaMethod
from sstf.methods.ngram import NgramConfig, NgramMethod
from sstf.methods.p_eagle import PEagleConfig, PEagleMethod
from sstf.methods.suffix import SuffixConfig, SuffixMethod

MethodConfig = Annotated[
    DFlashConfig
    | DominoConfig
    | DSparkConfig
    | EagleConfig
    | Eagle3Config
    | MedusaConfig
    | NgramConfig
    | PEagleConfig
    | SuffixConfig,
    Field(discriminator="kind"),
]

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "dflash": (DFlashConfig, DFlashMethod),
    "domino": (DominoConfig, DominoMethod),
    "dspark": (DSparkConfig, DSparkMethod),
    "eagle": (EagleConfig, EagleMethod),
    "eagle3": (Eagle3Config, Eagle3Method),
    "medusa": (MedusaConfig, MedusaMethod),
    "ngram": (NgramConfig, NgramMethod),
    "p_eagle": (PEagleConfig, PEagleMethod),
    "suffix": (SuffixConfig, SuffixMethod),
}


def build_method(config: MethodConfig) -> DraftMethod:
    """The method that a configuration describes."""
    method: DraftMethod = METHODS[config.kind][1](config)
    return method


__all__ = [
    "METHODS",
    "DFlashConfig",
    "DSparkConfig",
    "DominoConfig",
    "DraftMethod",
    "Drafter",
    "Eagle3Config",
    "EagleConfig",
    "MedusaConfig",
    "MethodConfig",
    "NgramConfig",
    "PEagleConfig",
    "SuffixConfig",
    "TrainableMethod",
    "build_method",
]
