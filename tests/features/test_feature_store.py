"""Damage to a store is found before anything is trained on it, and named; every bit of every file counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from feature_samples import contents, extract_to, random_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError
from sstf.features import ExtractConfig, FeatureStore, TopKSignal, VerifyReport, verify
from sstf.features import store as store_module
from sstf.features.sealed import NotSealedError, read_sealed, unsealed, write_sealed
from sstf.features.store import read_description, read_manifest, write_manifest, write_shard
from sstf.targets import Target
from sstf.types import FeatureBatch, TokenSample


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


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """Change a sealed file and seal it again, as only a faulty program could."""

    def edit(path: Path) -> None:
        content = read_sealed(path)
        change(content)
        write_sealed(path, content)

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
        (MANIFEST, truncate, "altered or cut off"),
        (MANIFEST, flip, "altered or cut off"),
        (MANIFEST, lambda path: path.write_text(""), "altered or cut off"),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe{}"), "altered or cut off"),
        (MANIFEST, lambda path: path.write_text("{}"), "altered or cut off"),
        (MANIFEST, lambda path: path.write_text("[1]"), "altered or cut off"),
        (
            MANIFEST,
            lambda path: path.write_text('{"format": 1, "layers": []}'),
            "format 1, this version reads 2; delete",
        ),
        (MANIFEST, edit(lambda m: m.pop("made_from")), "unreadable manifest"),
        (MANIFEST, edit(lambda m: m["made_from"]["target"].pop("hidden_size")), "unreadable manifest"),
        (MANIFEST, edit(lambda m: m["made_from"].update(codec="int3")), "codec 'int3'"),
        (MANIFEST, edit(lambda m: m["made_from"].update(layer_convention="1-based")), "layers are '1-based'"),
        (MANIFEST, edit(lambda m: m["made_from"].update(teacher={"kind": "topk", "k": 0})), "unreadable manifest"),
        (MANIFEST, edit(lambda m: m.update(format=3)), "format 3, this version reads 2"),
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
    report = verify(folder, NoProgress())
    assert not report.sound
    assert file in [fault.file for fault in report.faults]


def test_a_manifest_that_counts_otherwise_than_its_shards(folder: Path) -> None:
    edit(lambda m: m["shards"][0]["lengths"].__setitem__(0, 7))(folder / MANIFEST)
    with pytest.raises(DamagedDataError, match=r"shard-00000.* is torch.uint16 \[5\], the manifest says .* \[7\]"):
        read_everything(folder)
    edit(lambda m: m["shards"][0].update(ids=["s"] * 99, lengths=[5] * 99, trained=[3] * 99))(folder / MANIFEST)
    with pytest.raises(DamagedDataError, match=r"shard-00000\.safetensors: cannot be read"):
        read_everything(folder)


@pytest.mark.parametrize("file", [SHARD, "frozen.safetensors"])
def test_following_the_message_repairs_the_store(tiny_target: Target, whole: Path, folder: Path, file: str) -> None:
    """It says to delete the damaged file and the manifest, and to extract again."""
    flip(folder / file)
    (folder / file).unlink()
    (folder / MANIFEST).unlink()
    extract_to(folder, tiny_target, random_samples())
    read_everything(folder)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "altered or cut off"),
        (lambda path: path.write_text("{}"), "altered or cut off"),
        (edit(lambda d: d.pop("ids")), "not a shard's description"),
        # As format 1 wrote them.
        (lambda path: path.write_text('{"file": "", "ids": [], "lengths": []}'), "format 1, this version reads 2"),
    ],
)
def test_a_damaged_shard_description_is_named(
    tiny_target: Target, folder: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(folder / "shard-00000.json")
    with pytest.raises(DamagedDataError, match=rf"shard-00000\.json.*{says}"):
        extract_to(folder, tiny_target, random_samples())
    assert [fault.file for fault in verify(folder, NoProgress()).faults] == ["shard-00000.json"]


def test_a_shard_is_checked_once_and_only_when_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    digest = store_module.sha256_of
    monkeypatch.setattr(store_module, "sha256_of", lambda path: checked.append(path.name) or digest(path))
    store = FeatureStore(folder)
    assert checked == []
    store[0], store[1], store[0]
    assert checked == ["shard-00000.safetensors"]
    flip(folder / SHARD)
    store[0]  # damage elsewhere does not touch it
    with pytest.raises(DamagedDataError):
        store[len(store.shards[0].ids)]


# ---- every bit -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bf16", "int8 zstd topk"])
def small(request: pytest.FixtureRequest, tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ExtractConfig(shard_tokens=256)
    if request.param != "bf16":
        config = ExtractConfig(codec="int8", compression="zstd", teacher=TopKSignal(k=4), shard_tokens=256)
    folder = extract_to(tmp_path_factory.mktemp("small"), tiny_target, random_samples(20), config)
    assert len(list(folder.iterdir())) == 6  # two shards
    return folder


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_bit_of_every_file_counts(small: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(small.iterdir())))
    sound = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(sound) - 1))
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(damaged)
        assert [fault.file for fault in verify(small, NoProgress()).faults] == [path.name]
        if path.name == MANIFEST or path.suffix == ".safetensors":  # the others are not needed for reading
            with pytest.raises(DamagedDataError):
                read_everything(small)
    finally:
        path.write_bytes(sound)


def test_a_file_that_vouches_for_itself(tmp_path: Path) -> None:
    """All bits of a small one, not a sample of them."""
    path = tmp_path / "sealed.json"
    value = {"format": 2, "eps": 1e-05, "id": "\u001f Straße \\u00e9", "none": None, "list": [1, 2.0, True]}
    write_sealed(path, value)
    assert read_sealed(path) == value
    sound = path.read_bytes()
    assert len(json.loads(sound)["checksum"]) == 64
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            unsealed(damaged)
    for end in range(len(sound)):
        with pytest.raises(ValueError, match="checksum"):
            unsealed(sound[:end])
    with pytest.raises(NotSealedError):
        unsealed(b"[]")


# ---- verify ----------------------------------------------------------------------------------------------------------


def faults(report: VerifyReport) -> dict[str, str]:
    assert len({fault.file for fault in report.faults}) == len(report.faults)
    return {fault.file: fault.message for fault in report.faults}


def test_a_sound_store(whole: Path) -> None:
    report = verify(whole, NoProgress(), random_samples())
    assert report.faults == () and report.sound
    files = [file for file in whole.iterdir() if file.is_file()]
    assert (report.files, report.size) == (len(files), sum(file.stat().st_size for file in files))
    assert (report.conversations, report.tokens) == (30, sum(len(s.input_ids) for s in random_samples()))


def test_all_faults_are_listed(folder: Path) -> None:
    flip(folder / "shard-00000.safetensors")
    (folder / SHARD).unlink()
    flip(folder / "shard-00002.json")
    truncate(folder / "frozen.safetensors")
    (folder / "shard-00099.safetensors").write_bytes(b"left over")
    (folder / "done.json").write_text("{}")
    report = verify(folder, NoProgress(), beside=["done.json"])
    found = faults(report)
    assert set(found) == {
        "shard-00000.safetensors", SHARD, "shard-00002.json", "frozen.safetensors", "shard-00099.safetensors"
    }  # fmt: skip
    assert "does not belong to the store" in found["shard-00099.safetensors"]
    assert set(faults(verify(folder, NoProgress()))) == {*found, "done.json"}


def test_without_a_manifest_the_shards_are_still_checked(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    flip(folder / SHARD)
    truncate(folder / "shard-00002.json")
    assert set(faults(verify(folder, NoProgress()))) >= {MANIFEST, SHARD, "shard-00002.json"}
    assert set(faults(verify(folder / "nowhere", NoProgress()))) == {MANIFEST}


def test_a_manifest_of_another_target(whole: Path, folder: Path, tiny_target: Target) -> None:
    """Its checksums and the shards' descriptions both give it away; extraction refuses the mixture."""
    manifest = read_manifest(whole)
    other = replace(manifest.origin, target=replace(manifest.origin.target, fingerprint="f" * 16))
    write_manifest(folder, other, manifest.shards)  # the very same shards
    messages = faults(verify(folder, NoProgress()))
    assert set(messages) == {f"shard-0000{i}.json" for i in range(len(manifest.shards))}
    assert all("contradict each other" in message for message in messages.values())
    edit(lambda d: d["made_from"].update(target="tiny (ffffffffffffffff)"))(folder / "shard-00001.json")
    with pytest.raises(
        DamagedDataError, match=r"shard-00001\.safetensors was made with target tiny \(f+\), this run has"
    ):
        extract_to(folder, tiny_target, random_samples())


def test_other_data_than_the_stores(whole: Path) -> None:
    samples = random_samples()
    one = samples[3]
    changed = {
        "has other tokens": TokenSample(one.id, [*one.input_ids[:-1], 5], one.loss_mask),
        "another loss mask": TokenSample(one.id, one.input_ids, [not flag for flag in one.loss_mask]),
        "stands where the data has other": TokenSample("other", one.input_ids, one.loss_mask),
    }
    for says, sample in changed.items():
        (message,) = faults(verify(whole, NoProgress(), [*samples[:3], sample, *samples[4:]])).values()
        assert "conversation s3 " in message and says in message
    assert "holds 30 conversations, the data 29" in faults(verify(whole, NoProgress(), samples[:-1]))[MANIFEST]


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        ("2.features.values", lambda t: t[1].fill_(torch.nan), "conversation s2 has features that are not finite"),
        ("0.teacher.hidden.values", lambda t: t[0].fill_(torch.inf), "last hidden states that are not finite"),
        ("0.teacher.lse", lambda t: t[0].fill_(torch.nan), "log-sum-exp that are not finite"),
        ("0.loss_mask", lambda t: t.copy_(t.flip(0)), "cannot be read"),  # another number of rows follows from it
        ("0.input_ids", lambda t: t[0].fill_(300), "tokens outside the target's vocabulary of 300"),
        ("0.teacher.token", lambda t: t[0].fill_(301), "teacher tokens outside the target's vocabulary"),
    ],
)
def test_bytes_that_are_whole_but_wrong(folder: Path, tensor: str, change: Callable, says: str) -> None:  # type: ignore[type-arg]
    """Written so by a faulty program: every checksum agrees."""
    path = folder / "shard-00000.safetensors"
    tensors = load_file(path)
    change(tensors[tensor])
    save_file(tensors, path)
    assert says in faults(verify_resealed(folder))["shard-00000.safetensors"]


def test_a_tensor_too_many(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    save_file(load_file(path) | {"99.input_ids": torch.zeros(3)}, path)
    assert "holds 99.input_ids" in faults(verify_resealed(folder))["shard-00000.safetensors"]


def verify_resealed(folder: Path) -> VerifyReport:
    """Verify after giving the first shard the checksums that it now has."""
    path = folder / "shard-00000.safetensors"
    new = {"sha256": store_module.sha256_of(path), "size": path.stat().st_size}
    edit(lambda d: d.update(new))(folder / "shard-00000.json")
    edit(lambda m: m["shards"][0].update(new))(folder / MANIFEST)
    return verify(folder, NoProgress())


# ---- reading ---------------------------------------------------------------------------------------------------------


def same(one: FeatureBatch, other: FeatureBatch) -> bool:
    pairs = [(vars(one), vars(other)), (vars(one.teacher), vars(other.teacher))]
    return all(a[key].equal(b[key]) for a, b in pairs for key in a if isinstance(a[key], torch.Tensor))


def test_threads_may_share_a_store(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = FeatureStore(small)
    batches = [[i, (i + 5) % 20] for i in range(20)]
    expected = [alone.batch(batch) for batch in batches]
    checked: list[str] = []
    digest = store_module.sha256_of
    monkeypatch.setattr(store_module, "sha256_of", lambda path: checked.append(path.name) or digest(path))
    store, start, failed = FeatureStore(small), Barrier(4), []

    def read() -> None:
        start.wait()
        for batch, wanted in zip(batches, expected, strict=True):
            if not same(store.batch(batch), wanted):
                failed.append(batch)

    threads = [Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(checked) == ["shard-00000.safetensors", "shard-00001.safetensors"]  # once each


def test_a_batch_can_be_written_to_without_changing_the_store(small: Path) -> None:
    store = FeatureStore(small)
    before = store.batch([0, 1])
    spoiled = store.batch([0, 1])
    spoiled.features.zero_()
    spoiled.input_ids.zero_()
    spoiled.loss_mask.zero_()
    assert same(store.batch([0, 1]), before)


def test_descriptions_tell_what_the_shard_is_made_of(small: Path) -> None:
    origin = read_manifest(small).origin
    info, made_from = read_description(small / "shard-00001.json")
    assert info == FeatureStore(small).shards[1]
    assert made_from == origin.summary()
    assert made_from["layers"] == [1, 3, 4] and made_from["layer_convention"] == "0-based decoder layer outputs"
    assert origin.target.fingerprint in made_from["target"]


def test_a_rewritten_shard_has_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """In bfloat16, which rounds what it has rounded to itself."""
    store = FeatureStore(whole)
    first = store.shards[0]
    write_shard(tmp_path, 0, first.ids, [store[i] for i in range(len(first.ids))], store.origin)
    assert (tmp_path / first.file).read_bytes() == (whole / first.file).read_bytes()
