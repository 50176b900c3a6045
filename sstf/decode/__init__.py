"""Speculative decoding: verification rules, the engine, and how it adapts."""

from sstf.decode.adaptive import AnyPolicy, BanditPolicy, DecodePolicy, Experience
from sstf.decode.cost import CostModel
from sstf.decode.engine import Generation, SpeculativeDecoder, Step, Timings
from sstf.decode.limits import refuse_beyond, within
from sstf.decode.measure import measure_costs
from sstf.decode.verify import (
    Verified,
    verify_block,
    verify_deterministic,
    verify_greedy,
    verify_sampled,
    verify_traversal,
)

__all__ = [
    "AnyPolicy",
    "BanditPolicy",
    "CostModel",
    "DecodePolicy",
    "Experience",
    "Generation",
    "SpeculativeDecoder",
    "Step",
    "Timings",
    "Verified",
    "measure_costs",
    "refuse_beyond",
    "verify_block",
    "verify_deterministic",
    "verify_greedy",
    "verify_sampled",
    "verify_traversal",
    "within",
]
