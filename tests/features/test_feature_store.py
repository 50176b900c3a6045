"""Damage to a store is found before anything is trained on it, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from feature_samples import extract_to, random_samples

from sstf.errors import DamagedDataError
from sstf.features import FeatureStore
from sstf.features import store as store_module
from sstf.targets import Target


@pytest.fixture(scope="module")
def whole(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_to(tmp_path_factory.mktemp("whole"), tiny_target, random_samples())


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "store")


def read_everything(folder: Path) -> None:
    store = FeatureStore(folder)
    store.frozen_head()
    for i in range(len(store)):
        store[i]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def edit_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


SHARD = "shard-00001.safetensors"
MANIFEST = "manifest.json"


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        (SHARD, truncate, "bytes, expected"),
        (SHARD, flip, "checksum differs"),
        (SHARD, Path.unlink, "is missing"),
        (MANIFEST, Path.unlink, "is missing: the features are not finished"),
        (MANIFEST, lambda path: path.write_text(""), "not valid JSON"),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe{}"), "not valid JSON"),
        (MANIFEST, lambda path: path.write_text("{}"), "unreadable manifest"),
        (MANIFEST, lambda path: path.write_text("[1]"), "unreadable manifest"),
        (MANIFEST, edit_manifest(lambda m: m["target"].pop("hidden_size")), "unreadable manifest"),
        (MANIFEST, edit_manifest(lambda m: m.update(format=2)), "format 2, this version reads 1"),
        (MANIFEST, edit_manifest(lambda m: m["shards"][0]["lengths"].append(1)), "tokens, it holds"),
        ("frozen.safetensors", flip, "missing or altered"),
        ("frozen.safetensors", Path.unlink, "missing or altered"),
    ],
)
def test_damage_is_named(folder: Path, file: str, damage: Callable[[Path], None], says: str) -> None:
    damage(folder / file)
    with pytest.raises(DamagedDataError) as caught:
        read_everything(folder)
    assert caught.value.exit_code == 3
    assert str(folder / file) in str(caught.value)
    assert says in str(caught.value)
    assert "sstf extract" in str(caught.value)


@pytest.mark.parametrize("file", [SHARD, "frozen.safetensors"])
def test_following_the_message_repairs_the_store(tiny_target: Target, whole: Path, folder: Path, file: str) -> None:
    """It says to delete the damaged file and the manifest, and to extract again."""
    flip(folder / file)
    (folder / file).unlink()
    (folder / MANIFEST).unlink()
    extract_to(folder, tiny_target, random_samples())
    read_everything(folder)
    assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_a_garbage_shard_description_is_named(tiny_target: Target, folder: Path) -> None:
    (folder / "shard-00000.json").write_text("{}")
    with pytest.raises(DamagedDataError, match=r"shard-00000\.json: not a shard's description"):
        extract_to(folder, tiny_target, random_samples())


def test_a_shard_is_checked_once_and_only_when_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    checked: list[str] = []
    digest = store_module._sha256
    monkeypatch.setattr(store_module, "_sha256", lambda path: checked.append(path.name) or digest(path))
    store = FeatureStore(folder)
    assert checked == []
    store[0], store[1], store[0]
    assert checked == ["shard-00000.safetensors"]
    flip(folder / SHARD)
    store[0]  # damage elsewhere does not touch it
    with pytest.raises(DamagedDataError):
        store[len(store.shards[0].ids)]
