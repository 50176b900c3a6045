"""Silent failures, planted one by one: the ladder names the rung and the tensor. The untouched head passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_ladder import NEW, PROMPTS, climbed
from safetensors.torch import load_file, save_file
from torch import Tensor

from sstf.decode.passes import Passes
from sstf.formats import Engine, export_head
from sstf.heads import FusedEagle
from sstf.methods.checkpoint import read_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.parity.report import Parity, Rung
from sstf.targets import Target
from sstf.types import FeatureBatch, StepOutput

Alter = Callable[[dict[str, Tensor], dict[str, Any]], None]


def altered(head: Path, folder: Path, alter: Alter, engine: Engine = "vllm") -> Path:
    """An export with its tensors and its configuration changed."""
    export_head(read_head(head), engine, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    alter(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def top(parity: Parity) -> Rung:
    """The last rung, the only one that fails."""
    assert [rung.verdict for rung in parity.rungs[:-1]] == ["pass"] * (len(parity.rungs) - 1)
    return parity.rungs[-1]


def permuted_fc(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"].roll(1, 0).contiguous()


def later_layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for place in (config, config["eagle_config"]):
        for name in ("eagle_aux_hidden_state_layer_ids", "layer_ids"):
            if name in place:
                place[name] = [one + 1 for one in place[name]]


def flat_norm(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["norm.weight"] = torch.ones_like(tensors["norm.weight"])


def flat_hidden_norm(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    name = "midlayer.hidden_norm.weight"
    tensors[name] = torch.ones_like(tensors[name])


def other_theta(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["rope_theta"] = 5e5
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = 5e5


def other_vocabulary(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """As valid as the right one: the last two hundred tokens in place of those that were counted."""
    ids = torch.arange(100, 300)
    tensors["d2t"] = ids - torch.arange(200)
    tensors["t2d"] = torch.zeros(300, dtype=torch.bool).index_fill(0, ids, True)


@pytest.mark.parametrize(
    ("alter", "tensor"),
    [
        (permuted_fc, "fc.weight"),
        (later_layers, "layers"),
        (flat_norm, "norm.weight"),
        (flat_hidden_norm, "midlayer.hidden_norm.weight"),
        (other_theta, "rope.cos"),
        (other_vocabulary, "d2t"),
    ],
)
def test_exports_that_load_and_are_wrong(
    learned: Path, tiny_target: Target, tmp_path: Path, alter: Alter, tensor: str
) -> None:
    rung = top(climbed(learned, tiny_target, exported=altered(learned, tmp_path / "wrong", alter)))
    assert rung.verdict == "fail" and rung.name == "export wrong"
    assert rung.first_difference == tensor
    assert rung.faults[0].startswith(f"{tensor} ")
    assert rung.accepted_length is not None


def test_acceptance_that_a_wrong_export_costs(learned: Path, tiny_target: Target, tmp_path: Path) -> None:
    """Layers off by one, the field's commonest failure: nothing complains, and a head that was sure is not."""
    parity = climbed(learned, tiny_target, exported=altered(learned, tmp_path / "wrong", later_layers))
    trainer, reloaded, export = parity.rungs
    assert trainer.accepted_length == reloaded.accepted_length
    assert reloaded.accepted_length is not None and reloaded.accepted_length > 3
    assert export.accepted_length is not None and export.accepted_length < 3
    assert any("accepted length" in fault for fault in export.faults)


def lost_norm(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["norm.weight"]


def absolute_d2t(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["d2t"] += torch.arange(len(tensors["d2t"]))


def random_embeddings(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["embed_tokens.weight"] = torch.randn(300, 64)


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (lost_norm, "norm.weight"),
        (absolute_d2t, "d2t holds target ids; expected offsets"),
        (random_embeddings, "embed"),
    ],
)
def test_exports_that_are_not_even_read(
    learned: Path, tiny_target: Target, tmp_path: Path, alter: Alter, named: str
) -> None:
    rung = top(climbed(learned, tiny_target, exported=altered(learned, tmp_path / "wrong", alter)))
    assert rung.verdict == "fail" and named in " ".join([rung.first_difference or "", *rung.faults])


def test_lost_rope_scaling(learned: Path, tiny_target: Target, tmp_path: Path) -> None:
    head = shutil.copytree(learned, tmp_path / "head")
    fields = json.loads((head / "head.json").read_text())
    fields["method"]["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    (head / "head.json").write_text(json.dumps(fields))
    assert climbed(head, tiny_target, engines=("vllm",)).passed

    def unscaled(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config.pop("rope_scaling", None)
        if "rope_parameters" in config:
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}

    rung = top(climbed(head, tiny_target, exported=altered(head, tmp_path / "wrong", unscaled)))
    assert rung.first_difference == "rope.cos"


def test_the_untouched_head_passes(learned: Path, tiny_target: Target) -> None:
    parity = climbed(learned, tiny_target, engines=("vllm", "sglang", "speculators"))
    assert parity.passed, parity.faults
    assert [rung.name for rung in parity.rungs] == [
        "trainer", "reloaded", "export vllm", "export sglang", "export speculators",
    ]  # fmt: skip
    assert {rung.first_difference for rung in parity.rungs} == {None}
    # In float32 nothing is left to chance: what is replayed from drafts is what is decoded.
    assert len({rung.accepted_length for rung in parity.rungs}) == 1
    assert parity.rungs[1].same_text == 1
    assert (parity.prompts, parity.max_new_tokens, parity.depth) == (PROMPTS, NEW, 3)


# ---- the code itself -------------------------------------------------------------------------------------------------


def test_a_decoder_that_forgets_the_last_norm(
    learned: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedEagle, "logits", lambda self, out: out @ self.head.lm_head.weight.T)
    parity = climbed(learned, tiny_target, engines=())
    assert top(parity).name == "reloaded" and parity.rungs[-1].first_difference == "logits.0"


def test_a_decoder_that_loses_its_place(learned: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions stand still behind the text, as if later drafts overwrote the first."""
    real = FusedEagle.attend

    def still(self: FusedEagle, g: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        return real(self, g, tokens, torch.zeros_like(positions), mask, cache)

    monkeypatch.setattr(FusedEagle, "attend", still)
    assert top(climbed(learned, tiny_target, engines=())).first_difference == "attention.0"


def test_a_decoder_whose_features_are_one_token_late(
    learned: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Passes._features

    def late(self: Passes, hidden: Tensor) -> Tensor:
        return real(self, hidden).roll(1, 1)

    monkeypatch.setattr(Passes, "_features", late)
    rung = top(climbed(learned, tiny_target, engines=()))
    assert rung.first_difference == "features"
    assert rung.accepted_length is not None and rung.accepted_length < 2.5


def test_a_loss_that_is_taught_the_token_before(
    learned: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifted labels: what the loss counts as hits is not what the head drafts."""
    real = Eagle3Method.loss

    def shifted(self: Eagle3Method, head: Any, batch: FeatureBatch, frozen: Any) -> StepOutput:
        return real(self, head, replace(batch, teacher_token=batch.teacher_token.roll(1)), frozen)

    monkeypatch.setattr(Eagle3Method, "loss", shifted)
    first = climbed(learned, tiny_target, engines=()).rungs[0]
    assert first.verdict == "fail" and "of its hits agree" in first.faults[0]
