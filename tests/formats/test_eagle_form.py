"""EAGLE-1 heads as EAGLE's repository, vLLM and SGLang have them: names and sizes written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sstf.errors import ExportError, HeadError
from sstf.formats import Engine, export_head, load_any, read_any, sglang_algorithm, speculative_config
from sstf.methods import EagleConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle import EagleMethod
from sstf.targets import Target


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """Of the tiny target: hidden 64, 4 heads and 2 key/value heads of 16, inner size 128."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "post_attention_layernorm": (64,),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    if i:  # the first reads what fc makes, which is not normed
        shapes["input_layernorm"] = (64,)
    return {f"layers.{i}.{name}.weight": shape for name, shape in shapes.items()}


def make_head(target: Target, **settings: Any) -> StoredHead:
    """Random, with values that bf16 rounds."""
    config = EagleConfig.model_validate(settings)
    method = EagleMethod(config)
    torch.manual_seed(3)
    ids = torch.randperm(300)[: min(300, method.draft_vocab_size)].sort().values
    head = method.build_head(target.spec, target.frozen_head, ids)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    return StoredHead(config, tensors, method.feature_spec(target.spec).layers, target.spec, {})


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("engine", "architecture"), [("vllm", "EagleLlamaForCausalLM"), ("sglang", "LlamaForCausalLMEagle")]
)
def test_what_engines_are_given(
    engine: Engine, architecture: str, layers: int, tiny_target: Target, tmp_path: Path
) -> None:
    stored = make_head(tiny_target, num_layers=layers)
    export_head(stored, engine, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = {"fc.bias": (64,)} if engine == "sglang" else {}  # SGLang's fc has one, and would start it from noise
    expected = {"fc.weight": (64, 128)} | bias | {name: size for i in range(layers) for name, size in layer(i).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert not bias or not tensors["fc.bias"].any()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [architecture] and config["num_hidden_layers"] == layers
    assert config["model_type"] == "llama" and config["vocab_size"] == 300 and not config["tie_word_embeddings"]
    assert config["rope_theta"] == 10000.0 and config["head_dim"] == 16 and config["bias"] == bool(bias)
    back = read_any(tmp_path, tiny_target.spec)
    assert back.layers == stored.layers == (7,) and back.config == EagleConfig(num_layers=layers)
    for name, tensor in stored.tensors.items():
        rounded = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(back.tensors[name], rounded), name


def test_a_head_of_eagles_repository(tiny_target: Target, tmp_path: Path) -> None:
    """It brings the target's embeddings, a bias of fc that is zero, and a configuration of Llama's."""
    stored = make_head(tiny_target)
    own = {name: tensor for name, tensor in stored.tensors.items() if name not in ("d2t", "t2d")}
    theirs = {"embed_tokens.weight": tiny_target.frozen_head.embeddings.clone(), "fc.bias": torch.zeros(64)}
    save_file(own | theirs, tmp_path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = load_any(tmp_path, tiny_target)
    assert back.module is not None
    found = back.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.tensors.items())
    for change, message in (
        ({"fc.bias": torch.ones(64)}, "its fc has a bias"),
        ({"embed_tokens.weight": torch.ones(300, 64)}, "embeddings of its own"),
        ({"layers.0.input_layernorm.weight": torch.ones(64)}, "holds the tensor layers.0.input_layernorm.weight"),
    ):
        save_file(own | theirs | change, tmp_path / "model.safetensors")
        with pytest.raises(HeadError, match=message):
            load_any(tmp_path, tiny_target)
    save_file(own, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(HeadError, match=r"its layers have rope_theta=500000\.0, those of EAGLE heads here are as in"):
        read_any(tmp_path, tiny_target.spec)


def test_what_is_refused(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="drafts from all 300 tokens with an EAGLE head, this one from 100"):
        export_head(make_head(tiny_target, draft_vocab_size=100), "vllm", tmp_path)
    with pytest.raises(ExportError, match="speculators does not know this head's method, eagle; export it for vllm or"):
        export_head(make_head(tiny_target), "speculators", tmp_path)
    assert speculative_config("eagle", "f", 3)["method"] == "eagle" and sglang_algorithm("eagle") == "EAGLE"
