from __future__ import annotations

from pathlib import Path

import pytest
from tiny_store import make_store, own_answers, pinned_target
from transformers import PreTrainedTokenizerFast

from sstf.features import FeatureStore
from sstf.targets import Target
from sstf.types import TokenSample


@pytest.fixture(scope="session")
def tiny_target(tokenizer_folder: Path) -> Target:
    """A target of its own, because a loss curve is pinned on it."""
    return pinned_target(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))


@pytest.fixture(scope="session")
def samples(tiny_target: Target) -> list[TokenSample]:
    return own_answers(tiny_target, 24)


@pytest.fixture(scope="session")
def store(tiny_target: Target, samples: list[TokenSample], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Read only."""
    return make_store(tiny_target, samples, tmp_path_factory.mktemp("features"))
