"""A tiny target and a head that learned the ladder's own texts by heart, so that acceptance has something to lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from learning import learn_texts
from parity_ladder import NEW, PROMPTS

from sstf.methods import Eagle3Config
from sstf.parity.texts import write_texts
from sstf.targets import Target


@pytest.fixture(scope="session")
def learned(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a head. Read only: tests alter copies."""
    folder = tmp_path_factory.mktemp("learned")
    config = Eagle3Config(ttt_steps=3, draft_vocab_size=200)
    return learn_texts(tiny_target, write_texts(tiny_target, PROMPTS, NEW), config, folder, 120)
