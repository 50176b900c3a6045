"""The ladder of heads that show their drafts alone: what the loss counts beside what the drafter drafts."""

from __future__ import annotations

import json
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
from torch import Tensor

from sstf.errors import HeadError
from sstf.formats import Engine, engines_of, export_head, needs_target
from sstf.heads import BlockHead, DominoHead, DSparkHead, Eagle1Head
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
from sstf.methods.block import BlockDrafter
from sstf.methods.checkpoint import read_head
from sstf.methods.early_exit import EarlyExitDrafter
from sstf.methods.medusa import MedusaDrafter, MedusaMethod
from sstf.methods.p_eagle import PEagleDrafter
from sstf.parity import ladder
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


def rotated(self: BlockDrafter, news: Any) -> Tensor:
    """Each draft from the place beside its own."""
    return FILL(self, news).roll(1, 1)


def another_mask(self: BlockHead, anchors: Tensor) -> Tensor:
    masks = torch.full((*anchors.shape, self.shape.block_size - 1), 17)
    return self.embed(torch.cat([anchors[..., None], masks], -1))


def uncorrected(self: Any, hidden: Tensor, state: Tensor) -> Tensor:
    """As if what was drafted before did not count."""
    return torch.zeros_like(LOW_RANK[type(self)](self, hidden, state))


def depths_rotated(self: PEagleDrafter, *given: Any) -> Tensor:
    return TAKE_IN(self, *given).roll(1, 1)


def one_place_late(self: Any, tokens: Tensor, g: Tensor) -> Tensor:
    """Beside each token what belongs to the one after it."""
    return READ(self, tokens, g.roll(1, -2))


def exit_elsewhere(self: Any, rows: Any) -> None:
    """What was remembered of the text, as if the layer above had been left."""
    REMEMBER(self, [replace(one, features=one.features.flip(-1)) for one in rows])


FILL, TAKE_IN, READ, REMEMBER = (
    BlockDrafter._fill,
    PEagleDrafter.take_in,
    Eagle1Head.read,
    EarlyExitDrafter._remember,
)
LOW_RANK: dict[Any, Any] = {DominoHead: DominoHead.low_rank, DSparkHead: DSparkHead.low_rank}


@pytest.mark.parametrize(
    ("kind", "place", "name", "fault"),
    [
        ("dflash", BlockDrafter, "_fill", rotated),
        ("dflash", BlockHead, "block", another_mask),
        ("domino", DominoHead, "low_rank", uncorrected),
        ("dspark", DSparkHead, "low_rank", uncorrected),
        ("dspark", BlockDrafter, "_fill", rotated),
        ("p_eagle", PEagleDrafter, "take_in", depths_rotated),
        ("eagle", Eagle1Head, "read", one_place_late),
        ("early_exit", EarlyExitDrafter, "_remember", exit_elsewhere),
    ],
)
def test_what_its_drafter_does_otherwise(
    kind: str, place: Any, name: str, fault: Any, heads: Callable[[str], Path], tiny_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each method's own way to draft differently from what its loss trained."""
    decoded = ladder.decoded

    def faulty(*given: Any, **named: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            form = decoded(*given, **named)
            assert form.trace
            traces = [form.trace(i) for i in range(PROMPTS)]
        return replace(form, trace=traces.__getitem__)

    monkeypatch.setattr(ladder, "decoded", faulty)
    trainer, reloaded = climbed(heads(kind), tiny_target, engines=()).rungs
    assert not trainer.faults and reloaded.faults, reloaded


def test_an_export_with_another_mask_token(heads: Callable[[str], Path], tiny_target: Target, tmp_path: Path) -> None:
    """Of P-EAGLE and DFlash it stands in the configuration alone."""
    for kind, change in (
        ("p_eagle", lambda fields: fields.update(pard_token=17)),
        ("dflash", lambda fields: fields["dflash_config"].update(mask_token_id=17)),
    ):
        export_head(read_head(heads(kind)), "vllm", tmp_path / kind, frozen=tiny_target.frozen_head)
        file = tmp_path / kind / "config.json"
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields))
        rung = climbed(heads(kind), tiny_target, exported=tmp_path / kind).rungs[-1]
        assert rung.first_difference == "mask_token" and rung.faults, kind


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
