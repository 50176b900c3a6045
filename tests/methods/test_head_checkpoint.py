from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sstf.data.atomic import write_json_atomic
from sstf.errors import DamagedDataError, HeadError
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import bind, load_head, read_head, save_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target

CONFIG = Eagle3Config(layers=(0, 5), draft_vocab_size=100, ttt_steps=3)
DRAFT_TOKENS = torch.arange(0, 300, 3)


@pytest.fixture
def saved(tiny_target: Target, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(5)
    head = Eagle3Method(CONFIG).build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS)
    save_head(tmp_path / "head", CONFIG, head, tiny_target.spec, {"step": 7})
    return tmp_path / "head", {name: tensor.clone() for name, tensor in head.state_dict().items()}


def rewrite(folder: Path, **changes: object) -> None:
    description = folder / "head.json"
    write_json_atomic(description, json.loads(description.read_text()) | changes)


def replace_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As if they had been saved like this: the checksum fits."""
    data = save(tensors)
    (folder / "head.safetensors").write_bytes(data)
    rewrite(folder, sha256=hashlib.sha256(data).hexdigest())


def test_round_trip(saved: tuple[Path, dict[str, Tensor]], tiny_target: Target) -> None:
    folder, state = saved
    stored = read_head(folder)
    assert (stored.config, stored.layers, stored.target, stored.run) == (CONFIG, (0, 5), tiny_target.spec, {"step": 7})
    head = load_head(folder, tiny_target)
    assert head.module is not None and not head.module.training
    assert not any(parameter.requires_grad for parameter in head.module.parameters())
    found = head.module.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    assert head.method.feature_spec(tiny_target.spec).layers == (0, 5)
    assert head.module.embeddings.data_ptr() == tiny_target.frozen_head.embeddings.data_ptr()  # shared, not copied


def test_target_of_other_weights(saved: tuple[Path, dict[str, Tensor]], tiny_target: Target) -> None:
    folder, _ = saved
    sibling = replace(tiny_target.spec, name="sibling", fingerprint="0" * 16)
    rewrite(folder, target=sibling.to_json())
    with pytest.raises(
        HeadError, match=r"trained for target sibling .* not for tiny .* the same shape but other weights"
    ):
        load_head(folder, tiny_target)
    rewrite(folder, target=replace(sibling, hidden_size=32).to_json())
    with pytest.raises(HeadError, match="another shape; load that target, or train a head for this one"):
        load_head(folder, tiny_target)


def test_every_kind_of_damage(saved: tuple[Path, dict[str, Tensor]], tiny_target: Target) -> None:
    folder, _ = saved
    tensors = folder / "head.safetensors"
    whole = tensors.read_bytes()
    for broken in (whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        tensors.write_bytes(broken)
        with pytest.raises(DamagedDataError, match=r"head\.safetensors: altered or cut off"):
            load_head(folder, tiny_target)
    tensors.unlink()
    with pytest.raises(DamagedDataError, match=r"head\.safetensors: cannot be read") as caught:
        load_head(folder, tiny_target)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\udcff"])
def test_damaged_description(saved: tuple[Path, dict[str, Tensor]], content: str) -> None:
    folder, _ = saved
    (folder / "head.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DamagedDataError, match=r"head\.json: unreadable .* train or copy the head again"):
        read_head(folder)


def test_a_setting_of_another_version(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """P-EAGLE's mask_token_id was mask_token once."""
    rewrite(saved[0], method={"kind": "p_eagle", "mask_token": 7})
    with pytest.raises(HeadError, match="the setting mask_token, which this version does not know; use the version"):
        read_head(saved[0])


def test_not_a_head(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = saved
    with pytest.raises(HeadError, match=r"no head\.json; expected a head folder"):
        read_head(tmp_path / "nowhere")
    rewrite(folder, format=2)
    with pytest.raises(HeadError, match="head format 2, this version reads 1"):
        read_head(folder)
    rewrite(folder, format=1, method={"kind": "eagle9"})
    with pytest.raises(DamagedDataError, match="unreadable"):
        read_head(folder)


def test_tensors_that_do_not_fit(saved: tuple[Path, dict[str, Tensor]], tiny_target: Target) -> None:
    folder, _ = saved
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "head.safetensors").items()}
    for wrong in (
        {name: tensor for name, tensor in tensors.items() if name != "fc.weight"},
        {name: tensor for name, tensor in tensors.items() if name != "d2t"},
        tensors | {"fc.weight": torch.zeros(64, 64)},
        tensors | {"surplus": torch.zeros(1)},
    ):
        replace_tensors(folder, wrong)
        with pytest.raises(HeadError, match="the stored tensors do not fit method eagle3"):
            bind(read_head(folder), tiny_target.frozen_head)
