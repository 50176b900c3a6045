"""Hidden-state data sets: what to extract, how it is stored, how it is aligned for training."""

from sstf.features.dataset import collate, epoch_batches, prompt_of, rows_ahead, split, to_device
from sstf.features.extract import WHOLE, ExtractConfig, Part, extract, own_target
from sstf.features.online import OnlineFeatures
from sstf.features.record import Features
from sstf.features.replay import Anchor, Replay, rejected_map
from sstf.features.selected import SelectedLayers
from sstf.features.source import FeatureSource, prefetched
from sstf.features.spec import FeatureSpec, HiddenSignal, TeacherSignal, TopKSignal
from sstf.features.store import FeatureStore, Origin
from sstf.features.verify import Fault, VerifyReport, verify

__all__ = [
    "WHOLE",
    "Anchor",
    "ExtractConfig",
    "Fault",
    "FeatureSource",
    "FeatureSpec",
    "FeatureStore",
    "Features",
    "HiddenSignal",
    "OnlineFeatures",
    "Origin",
    "Part",
    "Replay",
    "SelectedLayers",
    "TeacherSignal",
    "TopKSignal",
    "VerifyReport",
    "collate",
    "epoch_batches",
    "extract",
    "own_target",
    "prefetched",
    "prompt_of",
    "rejected_map",
    "rows_ahead",
    "split",
    "to_device",
    "verify",
]
