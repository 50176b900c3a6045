"""Doctor on heads of other methods: nothing fails on a sound one, and what it cannot ask it skips with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from spoilt_heads import alter_json, alter_tensors, failed, name_layers, not_passed, verdicts
from torch import Tensor

from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.progress import NoProgress
from sstf.formats import engines_of, export_head
from sstf.heads import BlockHead, FusedEagle1
from sstf.methods.block import BlockDrafter
from sstf.methods.checkpoint import read_head
from sstf.pipeline import Run
from sstf.targets import Target

METHODS: dict[str, dict[str, Any]] = {
    "medusa": {"kind": "medusa", "heads": 2, "draft_vocab_size": 250},
    "eagle": {"kind": "eagle", "ttt_steps": 2},
    "eagle3": {"kind": "eagle3", "num_layers": 2, "layers": [2, 4, 6], "ttt_steps": 2, "draft_vocab_size": 200},
    "early_exit": {"kind": "early_exit", "exit_layer": 6, "draft_vocab_size": 200},
    "dflash": {"kind": "dflash", "block_size": 4, "num_layers": 1, "layers": [2, 4, 6]},
    "domino": {"kind": "domino", "block_size": 4, "num_layers": 1, "layers": [2, 4, 6]},
    "dspark": {"kind": "dspark", "block_size": 4, "num_layers": 1, "layers": [2, 4, 6], "rank": 16},
    "p_eagle": {"kind": "p_eagle", "num_layers": 1, "layers": [2, 4, 6], "depth": 3, "draft_vocab_size": 200},
}
# EAGLE-3 of one layer is what all other tests of doctor are about.
SOME = [pytest.param(kind, marks=[pytest.mark.slow] if kind == "eagle3" else []) for kind in METHODS]
# What does not pass, and why.
OPEN: dict[str, dict[str, str]] = {
    "medusa": {
        "layer ids": "skipped: there is no fc",
        "tied weights": "skipped: the head has no lm_head",
        "rotary positions": "skipped: MedusaHead has no rotary positions",
        "norm weights": "skipped: the head has no norm",
        # A random target's second token ahead does not follow from its states: what Medusa knows of it is little.
        "label shift": "warn: ",
        "feature shift": "warn: ",
    },
    "eagle": {"tied weights": "skipped: the head has no lm_head"},
    "eagle3": {},
    "early_exit": {"layer ids": "skipped: there is no fc", "tied weights": "skipped: the head has no lm_head"},
    "dflash": {"tied weights": "skipped: the head has no lm_head"},
    "domino": {"tied weights": "skipped: the head has no lm_head"},
    "dspark": {"tied weights": "skipped: the head has no lm_head"},
    "p_eagle": {},
}


@pytest.fixture(scope="module")
def heads(finished_config: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a head that was trained on the conversations of the finished run. Read only."""
    made: dict[str, Path] = {}
    fields = yaml.safe_load(finished_config.read_text(encoding="utf-8"))
    # A run of several heads would be another one to the tests that share the finished run.
    own = tmp_path_factory.mktemp("methods")
    shutil.copytree(run.config.folder, own / run.config.name)
    fields["output_dir"] = str(own)

    def head(kind: str) -> Path:
        if kind not in made:
            fields["method"] = METHODS[kind]
            fields["train"]["parity"] = False
            config = tmp_path_factory.mktemp(kind) / "run.yaml"
            config.write_text(yaml.safe_dump(fields), encoding="utf-8")
            run = Run(load(RunConfig, config, []), NoProgress())
            run.up_to("train")
            made[kind] = run.folder("train") / "head"
        return made[kind]

    return head


@pytest.mark.parametrize("kind", [each for each in SOME if "vllm" in engines_of(str(each.values[0]))])
def test_its_export(kind: str, heads: Callable[[str], Path], target: Target, tmp_path: Path) -> None:
    stored = read_head(heads(kind))
    export_head(stored, "vllm", tmp_path, frozen=target.frozen_head)
    assert failed(verdicts(tmp_path, target)) == []


@pytest.mark.parametrize("kind", SOME)
def test_a_sound_head(kind: str, heads: Callable[[str], Path], target: Target) -> None:
    checks = verdicts(heads(kind), target)
    assert failed(checks) == []
    others = not_passed(checks)
    assert others.keys() - {"layer alignment"} == OPEN[kind].keys()  # so little training tells neighbours apart badly
    for name, reason in OPEN[kind].items():
        assert reason in others[name]


# ---- faults of its own kind, planted ------------------------------------------------------------------------------


def copied(heads: Callable[[str], Path], kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(heads(kind), folder / "head"))


@pytest.mark.parametrize("kind", ["dflash", "p_eagle"])
def test_layers_off_by_one(kind: str, heads: Callable[[str], Path], target: Target, tmp_path: Path) -> None:
    head = name_layers(copied(heads, kind, tmp_path), [1, 3, 5])
    assert failed(verdicts(head, target)) == ["layer alignment"]


def test_the_layer_beside_the_exit(heads: Callable[[str], Path], target: Target, tmp_path: Path) -> None:
    """The same adapter behind one layer less."""

    def change(fields: dict[str, Any]) -> None:
        fields["method"]["exit_layer"] = 5
        fields["layers"] = [layer - 1 for layer in fields["layers"]]

    head = copied(heads, "early_exit", tmp_path)
    alter_json(head / "head.json", change)
    assert failed(verdicts(head, target)) == ["layer alignment"]


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_a_mask_token_that_was_replaced(
    kind: str, heads: Callable[[str], Path], target: Target, tmp_path: Path
) -> None:
    head = copied(heads, kind, tmp_path)
    alter_json(head / "head.json", lambda fields: fields["method"].update(mask_token_id=17))
    checks = verdicts(head, target)
    assert failed(checks) == ["tensors"] and "method.mask_token_id=17" in not_passed(checks)["tensors"]


@pytest.mark.parametrize("kind", ["dflash", "p_eagle"])
def test_another_mask_token(kind: str, heads: Callable[[str], Path], target: Target, tmp_path: Path) -> None:
    """Nothing in the files says that it was trained with the token that its method takes where none is named."""
    head = copied(heads, kind, tmp_path)
    if kind == "p_eagle":
        alter_json(head / "head.json", lambda fields: fields["method"].update(mask_token_id=40))
    else:
        alter_tensors(head, lambda tensors: tensors["mask_token"].fill_(40))
    assert failed(verdicts(head, target)) == ["mask token"]


def test_blocks_that_see_the_future(
    heads: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = BlockHead.context

    def leaking(self: BlockHead, features: Tensor, positions: Tensor) -> list[Tensor]:
        return context(self, features + 0.3 * features.flip(0).cumsum(0).flip(0).roll(-1, 0), positions)

    monkeypatch.setattr(BlockHead, "context", leaking)
    assert "leak from the future" in failed(verdicts(heads("dflash"), target))


def test_a_block_s_norm_left_out_where_it_drafts(
    heads: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = BlockDrafter._fill

    def flagless(self: BlockDrafter, news: Any) -> Tensor:
        kept = self.head.norm.weight.clone()
        self.head.norm.weight.fill_(1)
        out = fill(self, news)
        self.head.norm.weight.copy_(kept)
        return out

    monkeypatch.setattr(BlockDrafter, "_fill", flagless)
    checks = verdicts(heads("dspark"), target)
    assert failed(checks) == ["norm weights"] and "norm.weight" in not_passed(checks)["norm weights"]


def test_an_eagle_head_whose_layers_do_not_count_where_it_drafts(
    heads: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FusedEagle1.__call__

    def flat(self: FusedEagle1, *given: Any) -> Tensor:
        return torch.zeros_like(step(self, *given))

    monkeypatch.setattr(FusedEagle1, "__call__", flat)
    assert failed(verdicts(heads("eagle"), target)) == ["norm weights"]
