from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from sstf.data.tokens import TokenStore, supervised_frequencies
from sstf.errors import DamagedDataError, DataError
from sstf.types import TokenSample

SAMPLES = [
    TokenSample("a", [5, 6, 7], [False, True, True]),
    TokenSample("b", [], []),
    TokenSample("c", [7, 7], [False, True]),
]

SOURCES = ["x", "y", "x"]


def test_round_trip_and_layout(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    assert not store.exists()
    store.write(SAMPLES, SOURCES)
    assert store.exists()
    assert store.read() == SAMPLES
    assert store.sources() == SOURCES
    with safe_open(tmp_path / "tokens.safetensors", "pt") as file:
        assert file.get_tensor("input_ids").tolist() == [5, 6, 7, 7, 7]
        assert file.get_tensor("loss_mask").tolist() == [0, 1, 1, 0, 1]
        assert file.get_tensor("offsets").tolist() == [0, 3, 3, 5]
    manifest = json.loads((tmp_path / "tokens.json").read_text())
    assert (manifest["samples"], manifest["tokens"], manifest["trained_tokens"]) == (3, 5, 3)


def test_writing_again_replaces(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    store.write(SAMPLES, SOURCES)
    store.write(SAMPLES[:1], SOURCES[:1])
    assert store.read() == SAMPLES[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.json", "tokens.safetensors"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    store.write(SAMPLES, SOURCES)
    whole = store.tensors.read_bytes()
    for position in range(len(whole)):
        store.tensors.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamagedDataError, match=r"tokens\.safetensors does not match .* delete both and run"):
            store.read()


def test_damage_and_absence(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    with pytest.raises(DataError, match=r"tokens\.json does not exist; run the data stage first"):
        store.read()
    store.write(SAMPLES, SOURCES)
    store.tensors.write_bytes(store.tensors.read_bytes()[:-1])
    with pytest.raises(DamagedDataError) as caught:
        store.read()
    assert caught.value.exit_code == 3
    store.tensors.unlink()
    with pytest.raises(DamagedDataError, match=r"tokens\.safetensors is missing"):
        store.read()
    store.manifest.write_text('{"format": 1, "sha256": "", "ids": []}')
    with pytest.raises(DataError, match="has format 1, this version reads 2"):
        store.read()
    store.manifest.write_text("{")
    with pytest.raises(DamagedDataError, match=r"tokens\.json is not readable"):
        store.read()


def test_frequencies_count_trained_tokens_only() -> None:
    assert supervised_frequencies(SAMPLES, 9).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0]
    assert supervised_frequencies([], 3).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="token 7, beyond the target's vocabulary of 7"):
        supervised_frequencies(SAMPLES, 7)
