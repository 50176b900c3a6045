"""Medusa heads as vLLM loads them: names and sizes from its source, written out here, and the names of Medusa's own
repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sstf.errors import ExportError, HeadError
from sstf.formats import export_head, load_any, read_any, speculative_config
from sstf.methods import MedusaConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.medusa import MedusaMethod
from sstf.targets import Target


def make_head(target: Target, **settings: Any) -> StoredHead:
    """Random, with values that bf16 rounds; of the tiny target: hidden size 64, 300 tokens."""
    config = MedusaConfig.model_validate({"heads": 2, "layers": 2} | settings)
    method = MedusaMethod(config)
    torch.manual_seed(3)
    ids = torch.randperm(300)[: min(300, method.draft_vocab_size)].sort().values
    head = method.build_head(target.spec, target.frozen_head, ids)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.1)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    return StoredHead(config, tensors, method.feature_spec(target.spec).layers, target.spec, {})


BLOCKS: dict[str, tuple[int, ...]] = {
    f"blocks.{i}.layers.{j}.{part}": size
    for i in (0, 1)
    for j in (0, 1)
    for part, size in (("weight", (64, 64)), ("bias", (64,)))
}


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, {"lm_head.weight": (300, 64)}),
        ({"draft_vocab_size": 100}, {"lm_head.weight": (100, 64), "token_map": (100,)}),
        ({"lm_head": "own"}, {"lm_heads.0.weight": (300, 64), "lm_heads.1.weight": (300, 64)}),
    ],
)
def test_what_vllm_is_given(
    settings: dict[str, Any], extra: dict[str, Any], tiny_target: Target, tmp_path: Path
) -> None:
    stored = make_head(tiny_target, **settings)
    assert export_head(stored, "vllm", tmp_path, frozen=tiny_target.frozen_head) == [
        "needs vLLM 0.32.0 or later; tried here with 0.32.0"
    ]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == BLOCKS | extra
    size = settings.get("draft_vocab_size", 300)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "torch_dtype": "bfloat16",
        "hidden_size": 64,
        "vocab_size": 300,
        "truncated_vocab_size": size,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "medusa_fc_bias": True,
        "original_lm_head": "lm_head" not in settings,
    }
    ids = stored.tensors["d2t"] + torch.arange(size)
    if "token_map" in extra:
        assert torch.equal(tensors["token_map"], ids)
    if "lm_head.weight" in extra:
        assert torch.equal(tensors["lm_head.weight"], tiny_target.frozen_head.lm_head[ids].bfloat16())
    back = read_any(tmp_path, tiny_target.spec)
    assert back.config.model_dump() == stored.config.model_dump() and back.layers == stored.layers == (7,)
    assert back.tensors.keys() == stored.tensors.keys()
    for name, tensor in stored.tensors.items():
        rounded = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(back.tensors[name], rounded), name
    load_any(tmp_path, tiny_target)  # the lm_head that came along is the target's
    assert speculative_config("medusa", "folder", 2) == {
        "method": "medusa",
        "model": "folder",
        "num_speculative_tokens": 2,
    }


def test_heads_as_medusas_repository_has_them(tiny_target: Target, tmp_path: Path) -> None:
    """`<head>.<layer>.linear`, and behind the layers each head's lm_head; the configuration names no vocabulary."""
    stored = make_head(tiny_target, lm_head="own")
    theirs: dict[str, Tensor] = {}
    for i in (0, 1):
        for j in (0, 1):
            for part in ("weight", "bias"):
                theirs[f"{i}.{j}.linear.{part}"] = stored.tensors[f"blocks.{i}.layers.{j}.{part}"]
        theirs[f"{i}.2.weight"] = stored.tensors[f"lm_heads.{i}.weight"]
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 2}))
    back = read_any(tmp_path, tiny_target.spec)
    assert back.config == stored.config
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in stored.tensors.items())


def test_an_unordered_token_map_is_read_in_order(tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target, draft_vocab_size=100)
    export_head(stored, "vllm", tmp_path, frozen=tiny_target.frozen_head)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in ("token_map", "lm_head.weight"):
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file)
    back = read_any(tmp_path, tiny_target.spec)
    assert torch.equal(back.tensors["d2t"], stored.tensors["d2t"])
    load_any(tmp_path, tiny_target)


def test_what_is_refused(tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target)
    with pytest.raises(ExportError, match="sglang does not know this head's method, medusa; export it for vllm"):
        export_head(stored, "sglang", tmp_path)
    with pytest.raises(ExportError, match="name the target to export them"):
        export_head(stored, "vllm", tmp_path)
    with pytest.raises(ExportError, match="reads lm_heads of all 300 tokens, these heads have their own of 100"):
        export_head(make_head(tiny_target, lm_head="own", draft_vocab_size=100), "vllm", tmp_path)
    assert not list(tmp_path.iterdir())
    export_head(stored, "vllm", tmp_path, frozen=tiny_target.frozen_head)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "blocks.1.layers.0.bias"}, file)
    with pytest.raises(HeadError, match=r"lacks the tensor blocks\.1\.layers\.0\.bias"):
        read_any(tmp_path, tiny_target.spec)
    tensors["lm_head.weight"][7] += 1
    save_file(tensors, file)
    with pytest.raises(HeadError, match="an lm_head of its own: 1 of 300 tokens"):
        load_any(tmp_path, tiny_target)
