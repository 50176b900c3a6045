"""sstf: train draft heads that make a frozen language model decode faster without changing a word it says."""

from sstf.decode import Generation, SpeculativeDecoder
from sstf.methods.checkpoint import DraftHead, load_head
from sstf.targets import Target, load_target
from sstf.trees import Chain, DynamicTree

__all__ = [
    "Chain",
    "DraftHead",
    "DynamicTree",
    "Generation",
    "SpeculativeDecoder",
    "Target",
    "load_head",
    "load_target",
]
