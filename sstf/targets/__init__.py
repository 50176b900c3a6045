"""Frozen targets: loading, layer taps, key/value caches, sampling, and the parts a head is built from."""

from sstf.targets.cache import PreallocatedCache, causal_mask
from sstf.targets.embedded import EMBEDDED, locate
from sstf.targets.frozen_head import FrozenHead
from sstf.targets.huggingface import LayerTaps, Target, TargetConfig, load_configured, load_target
from sstf.targets.spec import TargetSpec
from sstf.targets.split import SplitDecoder

__all__ = [
    "EMBEDDED",
    "FrozenHead",
    "LayerTaps",
    "PreallocatedCache",
    "SplitDecoder",
    "Target",
    "TargetConfig",
    "TargetSpec",
    "causal_mask",
    "load_configured",
    "load_target",
    "locate",
]
