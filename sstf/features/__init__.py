"""Hidden-state data sets: what to extract, how it is stored, how it is aligned for training."""

from sstf.features.dataset import collate, epoch_batches, shift_left, split, to_device
from sstf.features.extract import ExtractConfig, extract
from sstf.features.spec import FeatureSpec
from sstf.features.store import Features, FeatureStore

__all__ = [
    "ExtractConfig",
    "FeatureSpec",
    "FeatureStore",
    "Features",
    "collate",
    "epoch_batches",
    "extract",
    "shift_left",
    "split",
    "to_device",
]
