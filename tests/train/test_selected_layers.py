from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_store import METHOD, head_bytes, train, train_config

from sstf.data.progress import NoProgress
from sstf.errors import DataError
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, SelectedLayers, extract
from sstf.methods import build_method
from sstf.targets import Target
from sstf.train.trainer import Trainer
from sstf.types import TokenSample


@pytest.fixture(scope="module")
def wide(tiny_target: Target, samples: list[TokenSample], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """With more layers than the method reads, and not in its order."""
    folder = tmp_path_factory.mktemp("wide")
    config = ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128)
    extract(tiny_target, samples, FeatureSpec((7, 4, 1, 0, 3)), config, folder, NoProgress())
    return FeatureStore(folder)


def test_the_layers_asked_for_in_the_order_asked_for(wide: FeatureStore) -> None:
    whole, two = wide.batch([2, 5]), SelectedLayers(wide, (3, 7)).batch([2, 5])
    assert torch.equal(two.features, torch.cat([whole.features[:, 256:320], whole.features[:, :64]], 1))
    assert torch.equal(two.labels, whole.labels)
    assert SelectedLayers(wide, ()).batch([2]).features.shape == (len(wide.batch([2]).labels), 0)


def test_training_on_some_layers_of_a_store_is_training_on_a_store_of_them(
    wide: FeatureStore, store: FeatureStore, tmp_path: Path
) -> None:
    selected = SelectedLayers(wide, store.layers)
    trainer = Trainer(selected, build_method(METHOD), METHOD, train_config(), tmp_path / "selected", 0)
    trainer.run(NoProgress(), "tiny", {})
    train(store, tmp_path / "own")
    assert head_bytes(tmp_path / "selected") == head_bytes(tmp_path / "own")


def test_a_layer_that_is_not_there(wide: FeatureStore) -> None:
    with pytest.raises(DataError, match=r"holds layers \[7, 4, 1, 0, 3\], not \[2\]; extract again with them"):
        SelectedLayers(wide, (1, 2))
