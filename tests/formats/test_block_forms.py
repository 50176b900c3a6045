"""Block heads as engines have them: names and sizes of DFlash's published checkpoints, written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sstf.errors import ExportError, HeadError
from sstf.formats import Engine, export_head, load_any, read_any, sglang_algorithm, speculative_config
from sstf.methods import DFlashConfig, DSparkConfig, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import StoredHead
from sstf.targets import Target


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """Of the tiny target: hidden 64, 4 heads and 2 key/value heads of 16, inner size 128."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,),
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    return {f"layers.{i}.{name}.weight": shape for name, shape in shapes.items()}


BODY = {"fc.weight": (64, 192), "hidden_norm.weight": (64,), "norm.weight": (64,)} | layer(0) | layer(1)
REDUCED = {"lm_head.weight": (100, 64), "d2t": (100,), "t2d": (300,)}


def make_head(target: Target, kind: type[Any] = DFlashConfig, **settings: Any) -> StoredHead:
    """Random, with values that bf16 rounds."""
    config = kind.model_validate({"num_layers": 2, "layers": (1, 3, 5), "mask_token_id": 7, "block_size": 5} | settings)
    method = build_method(config)
    assert isinstance(method, TrainableMethod)
    torch.manual_seed(3)
    ids = torch.randperm(300)[: min(300, method.draft_vocab_size)].sort().values
    head = method.build_head(target.spec, target.frozen_head, ids)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    return StoredHead(config, tensors, (1, 3, 5), target.spec, {})


def check_back(stored: StoredHead, folder: Path, target: Target) -> None:
    back = read_any(folder, target.spec)
    assert back.layers == stored.layers and type(back.config) is type(stored.config)
    assert back.tensors.keys() == stored.tensors.keys()
    for name, tensor in stored.tensors.items():
        rounded = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(back.tensors[name], rounded), name
    load_any(folder, target)


@pytest.mark.parametrize(
    ("engine", "settings", "extra"),
    [("vllm", {}, {}), ("sglang", {}, {}), ("vllm", {"draft_vocab_size": 100}, REDUCED)],
)
def test_dflash(
    engine: Engine, settings: dict[str, Any], extra: dict[str, Any], tiny_target: Target, tmp_path: Path
) -> None:
    stored = make_head(tiny_target, **settings)
    export_head(stored, engine, tmp_path, frozen=tiny_target.frozen_head)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == BODY | extra
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"] == {"mask_token_id": 7, "target_layer_ids": [1, 3, 5]}
    assert config["layer_types"] == ["full_attention"] * 2 and config["num_target_layers"] == 8
    assert config["num_hidden_layers"] == 2 and config["block_size"] == 5 and not config["tie_word_embeddings"]
    assert config["draft_vocab_size"] == settings.get("draft_vocab_size", 300)
    if extra:
        ids = stored.tensors["d2t"] + torch.arange(100)
        assert torch.equal(tensors["lm_head.weight"], tiny_target.frozen_head.lm_head[ids].bfloat16())
    check_back(stored, tmp_path, tiny_target)
    assert speculative_config("dflash", "f", 4)["method"] == "dflash" and sglang_algorithm("dflash") == "DFLASH"


MARKOV = {
    "markov_head.markov_w1.weight": (300, 8),
    "markov_head.markov_w2.weight": (300, 8),
    "confidence_head.proj.weight": (1, 72),
    "confidence_head.proj.bias": (1,),
}


@pytest.mark.parametrize(
    ("settings", "extra"),
    [({}, {}), ({"draft_vocab_size": 100}, REDUCED | {"markov_head.markov_w2.weight": (100, 8)})],
)
def test_dspark(settings: dict[str, Any], extra: dict[str, Any], tiny_target: Target, tmp_path: Path) -> None:
    """vLLM reads at the top of the configuration what DFlash keeps in a part of its own."""
    stored = make_head(tiny_target, DSparkConfig, rank=8, **settings)
    export_head(stored, "vllm", tmp_path, frozen=tiny_target.frozen_head)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == BODY | MARKOV | extra
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"] and "dflash_config" not in config
    expected = {
        "mask_token_id": 7,
        "target_layer_ids": [1, 3, 5],
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
        "block_size": 5,
    }
    assert {name: config[name] for name in expected} == expected
    check_back(stored, tmp_path, tiny_target)
    for name, value, message in (
        ("markov_head_type", "gated", "asks for markov_head_type='gated'"),
        ("sample_from_anchor", False, "asks for sample_from_anchor=False"),
        ("markov_rank", 4, r"confidence_head\.proj\.weight has the shape \[1, 72\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(HeadError, match=message):
            read_any(tmp_path, tiny_target.spec)


@pytest.mark.parametrize(
    "settings",
    [
        {"intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-4},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_other_shapes(settings: dict[str, Any], tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target, **settings)
    export_head(stored, "vllm", tmp_path)
    check_back(stored, tmp_path, tiny_target)
    back = read_any(tmp_path, tiny_target.spec).config
    assert {name: getattr(back, name) for name in settings} == settings


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c["dflash_config"].update(causal=True), "dflash_config asks for causal=True"),
        (lambda c, t: c["dflash_config"].update(target_layer_ids=[3, 1, 5]), "in ascending order"),
        (lambda c, t: c["dflash_config"].update(target_layer_ids=[1, 3, 8]), "the target with 8 layers lacks some"),
        (lambda c, t: c["dflash_config"].pop("mask_token_id"), "mask_token_id is None; expected a token of the"),
        (lambda c, t: c["dflash_config"].update(mask_token_id=300), "mask_token_id is 300"),
        (lambda c, t: c.update(layer_types=["sliding_attention"] * 2), "asks for layer_types"),
        (lambda c, t: c.update(block_size=1), "asks for what no head here can have"),
        (lambda c, t: t.pop("layers.1.self_attn.q_norm.weight"), r"lacks the tensor layers\.1\.self_attn\.q_norm"),
        (lambda c, t: t.update({"layers.0.self_attn.q_proj.bias": torch.ones(64)}), "holds the tensor layers.0"),
        (lambda c, t: t.update({"lm_head.weight": torch.ones(300, 64)}), "an lm_head of its own"),
    ],
)
def test_what_does_not_fit_is_refused(change: Change, message: str, tiny_target: Target, tmp_path: Path) -> None:
    export_head(make_head(tiny_target), "vllm", tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadError, match=message):
        load_any(tmp_path, tiny_target)


def test_what_cannot_be_exported(tiny_target: Target, tmp_path: Path) -> None:
    smaller = make_head(tiny_target, draft_vocab_size=100)
    with pytest.raises(ExportError, match="name the target to export it"):
        export_head(smaller, "vllm", tmp_path)
    with pytest.raises(ExportError, match=r"no version of SGLang up to 0\.5\.23 runs a head with a draft vocabulary"):
        export_head(smaller, "sglang", tmp_path, frozen=tiny_target.frozen_head)
    with pytest.raises(ExportError, match="name the target to export it"):
        export_head(smaller, "speculators", tmp_path)
    assert not list(tmp_path.iterdir())
