"""Speculative decoding: verification rules and the engine."""

from sstf.decode.engine import Generation, SpeculativeDecoder, Timings
from sstf.decode.verify import (
    Verified,
    verify_block,
    verify_deterministic,
    verify_greedy,
    verify_sampled,
    verify_traversal,
)

__all__ = [
    "Generation",
    "SpeculativeDecoder",
    "Timings",
    "Verified",
    "verify_block",
    "verify_deterministic",
    "verify_greedy",
    "verify_sampled",
    "verify_traversal",
]
