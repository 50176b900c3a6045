"""P-EAGLE heads as vLLM has them: EAGLE-3's files and what drafted positions read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sstf.errors import ExportError, HeadError
from sstf.formats import export_head, load_any, read_any, sglang_algorithm, speculative_config
from sstf.methods import PEagleConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.p_eagle import PEagleMethod
from sstf.targets import Target


def make_head(target: Target, **settings: Any) -> StoredHead:
    """Random, with values that bf16 rounds; of the tiny target's outputs of layers 1, 3 and 4."""
    given = {"layers": (1, 3, 4), "num_layers": 2, "depth": 5, "draft_vocab_size": 200}
    config = PEagleConfig.model_validate(given | settings)
    method = PEagleMethod(config)
    torch.manual_seed(3)
    ids = torch.randperm(300)[: min(300, method.draft_vocab_size)].sort().values
    head = method.build_head(target.spec, target.frozen_head, ids)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    return StoredHead(config, tensors, (1, 3, 4), target.spec, {})


@pytest.mark.parametrize(
    ("settings", "pard"), [({}, 299), ({"mask_token_id": 7}, 7), ({"draft_vocab_size": None}, 299)]
)
def test_what_vllm_is_given(settings: dict[str, Any], pard: int, tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target, **settings)
    export_head(stored, "vllm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    full = settings.get("draft_vocab_size", 200) is None
    assert ("d2t" in tensors) != full  # vLLM refuses a map where it needs none
    assert tensors["mask_hidden"].numel() == 3 * 64
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (64, 128)
    assert tensors["layers.1.self_attn.q_proj.weight"].shape == (64, 64)  # vLLM calls the first layers.0 itself
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 2
    assert config["pard_token"] == pard and config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    back = read_any(tmp_path, tiny_target.spec)
    assert isinstance(back.config, PEagleConfig) and back.layers == (1, 3, 4)
    assert (back.config.depth, back.config.mask_token_id) == (5, pard)
    for name, tensor in stored.tensors.items():
        rounded = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(back.tensors[name], rounded), name
    load_any(tmp_path, tiny_target)
    assert speculative_config("p_eagle", "f", 5) == {
        "method": "eagle3",
        "parallel_drafting": True,
        "model": "f",
        "num_speculative_tokens": 5,
    }


def test_a_head_of_another_publisher(tiny_target: Target, tmp_path: Path) -> None:
    """`mask_hidden` in any shape, `ptd_token_id`, the first layer as layers.0."""
    stored = make_head(tiny_target)
    export_head(stored, "vllm", tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for name in ("pard_token", "sstf_depth", "sstf_export"):
        del config[name]
    config["ptd_token_id"] = 11
    theirs = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    theirs["mask_hidden"] = tensors["mask_hidden"].view(1, 1, -1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(theirs, tmp_path / "model.safetensors")
    back = read_any(tmp_path, tiny_target.spec)
    assert back.config.mask_token_id == 11 and back.layers == (1, 3, 4)
    assert torch.equal(back.tensors["mask_hidden"], stored.tensors["mask_hidden"].bfloat16().float())
    for change, message in (
        ({"ptd_token_id": 300}, "its pard_token is 300"),
        ({"norm_output": True}, "asks for norm_output=True"),
        ({"rope_theta": 5e5}, "its layers have rope_theta="),
        ({"num_hidden_layers": 3}, r"lacks the tensor layers\.2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(HeadError, match=message):
            read_any(tmp_path, tiny_target.spec)


def test_engines_that_do_not_know_it(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="sglang does not know this head's method, p_eagle; export it for vllm"):
        export_head(make_head(tiny_target), "sglang", tmp_path)
    assert sglang_algorithm("p_eagle") is None
