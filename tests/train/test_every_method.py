"""Every method trains the same head on one process or two, in one go or two, from stored features or the target's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from every_method import METHODS, STEPS, in_one_go, in_two, method_of
from launching import ARGUMENTS, launch
from safetensors.torch import load_file
from tiny_store import metrics

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.features.online import OnlineFeatures
from sstf.targets import Target
from sstf.types import TokenSample

LAST = f"checkpoints/step-{STEPS:08d}"
PARTS = ("head.safetensors", "optimizer.safetensors")
EXTRACT = ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128)


@pytest.fixture(scope="module")
def stores(tiny_target: Target, samples: list[TokenSample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for each set of layers, and in `folders.json` which method reads which."""
    root, folders = tmp_path_factory.mktemp("stores"), {}
    for kind in METHODS:
        spec = method_of(kind).feature_spec(tiny_target.spec)
        folders[kind] = "-".join(map(str, spec.layers))
        if not (root / folders[kind]).exists():
            extract(tiny_target, samples, spec, EXTRACT, root / folders[kind], NoProgress())
    (root / "folders.json").write_text(json.dumps(folders), encoding="utf-8")
    return root


def store_of(stores: Path, kind: str) -> FeatureStore:
    return FeatureStore(stores / json.loads((stores / "folders.json").read_text(encoding="utf-8"))[kind])


@pytest.fixture(scope="module")
def alone(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains, in a folder for each method. Read only."""
    root = tmp_path_factory.mktemp("alone")
    for kind in METHODS:
        in_one_go(kind, store_of(stores, kind), root / kind)
    return root


@pytest.mark.parametrize("kind", METHODS)
def test_in_two_parts_to_the_bit(kind: str, alone: Path, stores: Path, tmp_path: Path) -> None:
    in_two(kind, store_of(stores, kind), tmp_path)
    for part in PARTS:
        assert (tmp_path / LAST / part).read_bytes() == (alone / kind / LAST / part).read_bytes()


@pytest.mark.parametrize("kind", METHODS)
def test_online_losses_are_those_of_a_store(
    kind: str, alone: Path, tiny_target: Target, samples: list[TokenSample], tmp_path: Path
) -> None:
    spec = method_of(kind).feature_spec(tiny_target.spec)
    in_one_go(kind, OnlineFeatures(tiny_target, samples, spec, EXTRACT), tmp_path)
    expected, found = metrics(alone / kind), metrics(tmp_path)
    assert len(found) == len(expected) >= STEPS
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_train_what_one_trains_and_resume(
    parallel: str, alone: Path, stores: Path, tmp_path: Path
) -> None:
    """One launch trains all the methods one after the other."""
    done = launch(*ARGUMENTS[parallel], str(Path(__file__).with_name("every_method.py")), str(stores), str(tmp_path))
    assert done.returncode == 0, done.stderr[-5000:]
    for kind in METHODS:
        facts = json.loads((tmp_path / kind / "facts.json").read_text(encoding="utf-8"))
        assert (facts["kind"], facts["processes"]) == (parallel, 2)
        for part in PARTS:
            found = load_file(tmp_path / kind / "whole" / LAST / part)
            expected = load_file(alone / kind / LAST / part)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{kind} {part} {name}")
            whole, parts = (tmp_path / kind / run / LAST / part for run in ("whole", "parts"))
            assert whole.read_bytes() == parts.read_bytes(), f"{kind} {part}"
