"""The ladder of heads that show their drafts alone: what the loss counts beside what the drafter drafts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn_texts
from parity_ladder import NEW, PROMPTS, climbed
from safetensors.torch import load_file, save_file

from sstf.errors import HeadError
from sstf.formats import Engine, engines_of, export_head, needs_target
from sstf.methods import (
    DFlashConfig,
    DominoConfig,
    DSparkConfig,
    Eagle3Config,
    EagleConfig,
    EarlyExitConfig,
    MedusaConfig,
    PEagleConfig,
)
from sstf.methods.checkpoint import read_head
from sstf.methods.medusa import MedusaDrafter, MedusaMethod
from sstf.parity.texts import write_texts
from sstf.targets import Target
from sstf.types import FeatureBatch, StepOutput

LEARNED: dict[str, Any] = {
    "medusa": MedusaConfig(heads=3),
    "eagle3": Eagle3Config(num_layers=2, ttt_steps=3, draft_vocab_size=200),  # of one layer, more is seen
    "eagle": EagleConfig(ttt_steps=3),
    "early_exit": EarlyExitConfig(exit_layer=4, depth=3, threshold=0, draft_vocab_size=200),
    "p_eagle": PEagleConfig(num_layers=1, depth=3, draft_vocab_size=200),
    "dspark": DSparkConfig(block_size=3, num_layers=1, layers=(1, 3, 5), rank=8),
    "domino": DominoConfig(block_size=4, num_layers=1, layers=(1, 3, 5)),
    "dflash": DFlashConfig(block_size=4, num_layers=1, layers=(1, 3, 5)),
}


@pytest.fixture(scope="module")
def heads(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a head of a method that learned the ladder's texts by heart. Read only."""
    made: dict[str, Path] = {}

    def head(kind: str) -> Path:
        if kind not in made:
            texts = write_texts(tiny_target, PROMPTS, NEW)
            made[kind] = learn_texts(tiny_target, texts, LEARNED[kind], tmp_path_factory.mktemp(kind), 60)
        return made[kind]

    return head


@pytest.mark.parametrize("kind", LEARNED)
def test_a_sound_head_drafts_what_its_loss_counts(kind: str, heads: Callable[[str], Path], tiny_target: Target) -> None:
    engines: tuple[Engine, ...] = ("vllm",) if "vllm" in engines_of(kind) else ()
    parity = climbed(heads(kind), tiny_target, engines=engines)
    assert parity.passed, parity.faults
    trainer, reloaded, *exported = parity.rungs
    assert (trainer.name, reloaded.name) == ("trainer", "reloaded")
    # All is float32 but for the features that training reads, which were rounded to bfloat16.
    assert reloaded.agreement is not None and reloaded.agreement > 0.99 and reloaded.same_text == 1.0
    assert reloaded.accepted_length and trainer.accepted_length and trainer.accepted_length > 1.5
    assert [rung.name for rung in exported] == ["export vllm"] * ("vllm" in engines_of(kind))
    assert all(rung.agreement and rung.agreement > 0.95 for rung in exported)  # bf16


def test_a_drafter_that_reads_the_wrong_place(
    heads: Callable[[str], Path], tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = MedusaDrafter.propose

    def late(self: MedusaDrafter, news: Any, policy: Any, context: Any) -> Any:
        return propose(self, [replace(one, features=one.features.roll(1, -1)) for one in news], policy, context)

    monkeypatch.setattr(MedusaDrafter, "propose", late)
    rung = climbed(heads("medusa"), tiny_target, engines=()).rungs[1]
    assert rung.name == "reloaded" and any("of its drafted tokens agree" in fault for fault in rung.faults)


def test_a_loss_that_counts_other_chains(
    heads: Callable[[str], Path], tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = MedusaMethod.loss

    def fewer(self: MedusaMethod, head: torch.nn.Module, batch: FeatureBatch, frozen: Any) -> StepOutput:
        found = loss(self, head, batch, frozen)
        return replace(found, chain_hits=found.chain_hits[:, 2:])

    monkeypatch.setattr(MedusaMethod, "loss", fewer)
    rung = climbed(heads("medusa"), tiny_target, engines=()).rungs[0]
    assert rung.faults == ("its loss counts other chains than text 0 has",)


def test_a_spoilt_export(heads: Callable[[str], Path], tiny_target: Target, tmp_path: Path) -> None:
    folder = heads("medusa")
    assert needs_target("medusa", "vllm")
    export_head(read_head(folder), "vllm", tmp_path, frozen=tiny_target.frozen_head)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.layers.0.weight"] = tensors["blocks.1.layers.0.weight"].roll(1, 0)
    save_file(tensors, file)
    rung = climbed(folder, tiny_target, exported=tmp_path).rungs[-1]
    assert rung.first_difference == "blocks.1.layers.0.weight" and rung.faults


def test_depths(heads: Callable[[str], Path], tiny_target: Target, tmp_path: Path) -> None:
    """Fewer than were taught are compared as far as they go; more than a pass can draft are refused."""
    parity = climbed(heads("medusa"), tiny_target, engines=(), depth=2)
    assert parity.passed and parity.depth == 2 and parity.rungs[1].agreement == 1.0
    with pytest.raises(HeadError, match="drafts at most 3 tokens a pass, not 4"):
        climbed(heads("medusa"), tiny_target, depth=4)
    broken = Path(shutil.copytree(heads("medusa"), tmp_path / "head"))
    assert (
        climbed(broken, tiny_target, engines=("sglang",))
        .faults[0]
        .startswith(
            "export sglang: it cannot be exported and read back: sglang does not know this head's method, medusa"
        )
    )
