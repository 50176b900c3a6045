"""vLLM serves heads of every method that it knows as our decoder does, or says what it lacks on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import NEW, PROMPTS, learn

from sstf.data.progress import NoProgress
from sstf.methods import DFlashConfig, EagleConfig, MedusaConfig
from sstf.parity.ladder import ParitySettings, climb
from sstf.targets import Target

pytestmark = pytest.mark.engine
WITHIN = 0.05  # of our decoder's accepted length

METHODS: dict[str, tuple[Any, float]] = {  # with a learning rate at which it learns in 50 steps
    "medusa": (MedusaConfig(heads=3), 3e-3),
    "eagle": (EagleConfig(ttt_steps=3, token_weight=1.0), 1e-3),
    "dflash": (DFlashConfig(block_size=4, num_layers=1, layers=(1, 14, 26), anchors=64), 1e-3),
}


@pytest.mark.parametrize("kind", METHODS)
def test_vllm_accepts_what_our_decoder_accepts(kind: str, vllm: Path, real_target: Target, tmp_path: Path) -> None:
    config, learning_rate = METHODS[kind]
    learned = learn(real_target, config, learning_rate, tmp_path)
    settings = ParitySettings(engines=("vllm",), prompts=PROMPTS, max_new_tokens=NEW, vllm=vllm)
    parity = climb(learned.head, real_target, settings, "bf16", NoProgress())
    print("\n" + parity.sentence)
    ours, theirs = parity.rungs[-2:]
    assert theirs.name == "vllm" and ours.accepted_length is not None and theirs.accepted_length is not None
    assert ours.accepted_length > 1.8  # there is something to lose
    assert theirs.accepted_length == pytest.approx(ours.accepted_length, rel=WITHIN)
    assert parity.passed, parity.faults
