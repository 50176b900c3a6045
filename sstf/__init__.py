"""sstf: train draft heads that make a frozen language model decode faster without changing a word it says."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sstf.decode import BanditPolicy, Experience, Generation, SpeculativeDecoder
    from sstf.methods.checkpoint import DraftHead, load_head
    from sstf.targets import Target, load_target
    from sstf.trees import Chain, CostAwareTree, DynamicTree, StaticTree
    from sstf.types import SamplingParams

__all__ = [
    "BanditPolicy",
    "Chain",
    "CostAwareTree",
    "DraftHead",
    "DynamicTree",
    "Experience",
    "Generation",
    "SamplingParams",
    "SpeculativeDecoder",
    "StaticTree",
    "Target",
    "load_head",
    "load_target",
]

# Imported at first use (PEP 562): torch takes seconds, and `sstf --help` needs none of it.
_HOMES = {
    "BanditPolicy": "sstf.decode",
    "Chain": "sstf.trees",
    "CostAwareTree": "sstf.trees",
    "DraftHead": "sstf.methods.checkpoint",
    "DynamicTree": "sstf.trees",
    "Experience": "sstf.decode",
    "Generation": "sstf.decode",
    "SamplingParams": "sstf.types",
    "SpeculativeDecoder": "sstf.decode",
    "StaticTree": "sstf.trees",
    "Target": "sstf.targets",
    "load_head": "sstf.methods.checkpoint",
    "load_target": "sstf.targets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
