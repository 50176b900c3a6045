"""Some of the layers that a source holds: several methods train on one store, in which all their layers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sstf.errors import DataError
from sstf.features.source import FeatureSource
from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch


class SelectedLayers:
    """A `FeatureSource` of the conversations of `source`, with `layers` of its layers, in that order.

    Raises:
        DataError: it lacks one of them.
    """

    def __init__(self, source: FeatureSource, layers: Sequence[int]) -> None:
        lacking = sorted(set(layers) - set(source.layers))
        if lacking:
            raise DataError(f"{source.name} holds layers {list(source.layers)}, not {lacking}; extract again with them")
        self.source, self.layers = source, tuple(layers)
        hidden = source.target.hidden_size
        starts = [source.layers.index(layer) * hidden for layer in layers]
        self._columns = torch.cat([torch.arange(start, start + hidden) for start in starts] or [torch.empty(0).long()])

    @property
    def name(self) -> str:
        """For messages."""
        return self.source.name

    @property
    def target(self) -> TargetSpec:
        """See `FeatureSource.target`."""
        return self.source.target

    @property
    def ids(self) -> Sequence[str]:
        """See `FeatureSource.ids`."""
        return self.source.ids

    @property
    def lengths(self) -> Sequence[int]:
        """See `FeatureSource.lengths`."""
        return self.source.lengths

    @property
    def trained(self) -> Sequence[int]:
        """See `FeatureSource.trained`."""
        return self.source.trained

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource.made_from`."""
        return self.source.made_from() | {"selected_layers": list(self.layers)}

    def place(self, index: int) -> str:
        """See `FeatureSource.place`."""
        return self.source.place(index)

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource.tokens_of`."""
        return self.source.tokens_of(index)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """See `FeatureSource.batch`."""
        whole = self.source.batch(indices)
        return replace(whole, features=whole.features[:, self._columns])

    def frozen_head(self) -> FrozenHead:
        """See `FeatureSource.frozen_head`."""
        return self.source.frozen_head()
