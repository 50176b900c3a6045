"""Features computed by the frozen target while the head trains: no disk, any amount of data, one target in memory.

The same forward pass, the same rounding to bfloat16 and the same alignment as `extract` and the store; conversations
meet others in a batch, so values differ from those of a bf16 store by floating-point rounding only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sstf.features.dataset import collate
from sstf.features.extract import ExtractConfig, data_digest
from sstf.features.record import Features
from sstf.features.shards import batches_of, read_features
from sstf.features.spec import FeatureSpec
from sstf.targets import FrozenHead, Target, TargetSpec
from sstf.types import FeatureBatch, TokenSample, TopKTeacher


class OnlineFeatures:
    """A `FeatureSource` over token samples and a loaded target."""

    def __init__(
        self, target: Target, samples: Sequence[TokenSample], spec: FeatureSpec, config: ExtractConfig
    ) -> None:
        self._target, self._samples, self._config = target, samples, config
        self.layers = spec.layers
        self.ids = [sample.id for sample in samples]
        self.lengths = [len(sample.input_ids) for sample in samples]
        self.trained = [sum(sample.loss_mask) for sample in samples]
        self._lock = threading.Lock()  # the taps hold what the last forward pass left

    @property
    def name(self) -> str:
        """For messages."""
        return f"target {self._target.spec.name}"

    @property
    def target(self) -> TargetSpec:
        """Of the target."""
        return self._target.spec

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource.made_from`."""
        return {
            "kind": "online",
            "target": f"{self.target.name} ({self.target.fingerprint})",
            "layers": list(self.layers),
            "teacher": self._config.teacher.model_dump(mode="json"),
            "data": data_digest(self._samples),
        }

    def place(self, index: int) -> str:
        """See `FeatureSource.place`."""
        return f"conversation {self.ids[index]}, computed by {self.name}"

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource.tokens_of`."""
        sample = self._samples[index]
        return torch.tensor(sample.input_ids), torch.tensor(sample.loss_mask, dtype=torch.bool)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """See `FeatureSource.batch`."""
        rows: dict[int, Features] = {}
        with self._lock, self._target.tap(self.layers) as taps:
            for group in batches_of([self.lengths[i] for i in indices], self._config.batch_tokens):
                chosen = [self._samples[indices[i]] for i in group]
                found = read_features(self._target, chosen, taps.features, self._config.teacher)
                rows |= dict(zip(group, found, strict=True))
        return collate([_rounded(rows[i]) for i in range(len(indices))])

    def frozen_head(self) -> FrozenHead:
        """See `FeatureSource.frozen_head`."""
        return self._target.frozen_head


def _rounded(row: Features) -> Features:
    """As a store with the bf16 codec would give it back."""
    features = row.features.to(torch.bfloat16)
    if isinstance(row.teacher, TopKTeacher):
        return replace(row, features=features)
    return replace(row, features=features, teacher=replace(row.teacher, hidden=row.teacher.hidden.to(torch.bfloat16)))
