"""What engines are given: every tensor, in their convention, with the numbers that were trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline_runs import WriteConfig, open_run
from safetensors import safe_open
from safetensors.torch import load_file

from sstf.errors import ExportError
from sstf.export import Engine, export_eagle3
from sstf.methods import NgramConfig
from sstf.methods.checkpoint import StoredHead, read_head

SHAPES = {  # hidden 64, 4 heads and 2 key/value heads of 16, inner size 128, 3 layers read, draft vocabulary 200
    "fc.weight": (64, 192),
    "midlayer.input_layernorm.weight": (64,),
    "midlayer.hidden_norm.weight": (64,),
    "midlayer.self_attn.q_proj.weight": (64, 128),
    "midlayer.self_attn.k_proj.weight": (32, 128),
    "midlayer.self_attn.v_proj.weight": (32, 128),
    "midlayer.self_attn.o_proj.weight": (64, 64),
    "midlayer.post_attention_layernorm.weight": (64,),
    "midlayer.mlp.gate_proj.weight": (128, 64),
    "midlayer.mlp.up_proj.weight": (128, 64),
    "midlayer.mlp.down_proj.weight": (64, 128),
    "norm.weight": (64,),
    "lm_head.weight": (200, 64),
    "d2t": (200,),
    "t2d": (300,),
}


@pytest.fixture
def stored(finished: Path) -> StoredHead:
    return read_head(open_run(finished).folder("train") / "head")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_tensors(finished: Path, stored: StoredHead, engine: str) -> None:
    file = open_run(finished).folder("export") / engine / "model.safetensors"
    tensors = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            assert torch.equal(tensor, stored.tensors[name])
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, stored.tensors[name].to(torch.bfloat16)), name
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    # An offset map: draft id + offset = target id, ascending, the ids that t2d marks.
    targets = torch.arange(200) + tensors["d2t"]
    assert targets.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("engine", "layers"), [("vllm", [2, 4, 5]), ("sglang", [1, 3, 4])])
def test_config(finished: Path, engine: str, layers: list[int]) -> None:
    """Ours are the outputs of layers 1, 3 and 4: vLLM counts the layers before, SGLang as we do."""
    config = json.loads((open_run(finished).folder("export") / engine / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == layers
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": layers,
        "layer_ids": layers,
        "use_aux_hidden_state": True,
    }
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": 64,
        "target_hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "draft_vocab_size": 200,
        "num_aux_hidden_states": 3,
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_full_draft_vocabulary_has_no_map(write_config: WriteConfig, engine: Engine, tmp_path: Path) -> None:
    """vLLM has no parameter for it in this case and refuses a checkpoint that holds one."""
    run = open_run(write_config(method__draft_vocab_size=300, train__steps=1))
    run.up_to("train")
    export_eagle3(read_head(run.folder("train") / "head"), engine, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    full = {name: shape for name, shape in SHAPES.items() if name not in ("d2t", "t2d")}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == full | {"lm_head.weight": (300, 64)}
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 300


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_refused(stored: StoredHead, name: str, tmp_path: Path) -> None:
    """vLLM would start it from noise without a word."""
    tensors = {key: tensor for key, tensor in stored.tensors.items() if key != name}
    with pytest.raises(ExportError, match=name):
        export_eagle3(replace(stored, tensors=tensors), "vllm", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tensor_a_wrong_shape_and_a_broken_value_are_refused(stored: StoredHead, tmp_path: Path) -> None:
    extra = stored.tensors | {"fc.bias": torch.zeros(64)}
    with pytest.raises(ExportError, match=r"fc\.bias \(found \(64,\), expected None\)"):
        export_eagle3(replace(stored, tensors=extra), "sglang", tmp_path)
    with pytest.raises(ExportError, match=r"norm\.weight \(found \(32,\), expected \(64,\)\)"):
        export_eagle3(replace(stored, tensors=stored.tensors | {"norm.weight": torch.ones(32)}), "sglang", tmp_path)
    with pytest.raises(ExportError, match=r"norm\.weight holds values that are not finite"):
        broken = stored.tensors | {"norm.weight": torch.full((64,), torch.nan)}
        export_eagle3(replace(stored, tensors=broken), "sglang", tmp_path)


def test_a_head_of_another_method_is_refused(stored: StoredHead, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="this head's method is ngram"):
        export_eagle3(replace(stored, config=NgramConfig()), "vllm", tmp_path)
