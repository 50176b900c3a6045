"""Heads that draft in one pass, in speculators' form: keys of its configurations, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_p_eagle_form
from safetensors.torch import load_file
from test_block_forms import BODY, MARKOV, REDUCED, check_back, make_head

from sstf.errors import ExportError, HeadError
from sstf.formats import export_head, needs_target, read_any
from sstf.methods import DFlashConfig, DominoConfig, DSparkConfig, MedusaConfig
from sstf.targets import Target


def read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return json.loads((folder / "config.json").read_text()), shapes


@pytest.mark.parametrize(
    ("kind", "built_as", "config", "first", "extra"),
    [
        ("dflash", "DFlashSpeculator", DFlashConfig, False, {}),
        ("dspark", "DSparkSpeculator", DSparkConfig, True, MARKOV),
    ],
)
def test_block_heads(
    kind: str, built_as: str, config: Any, first: bool, extra: dict[str, Any], tiny_target: Target, tmp_path: Path
) -> None:
    stored = make_head(tiny_target, config, **({"rank": 8} if first else {}))
    sentences = export_head(stored, "speculators", tmp_path, "somebody/tiny")
    assert sentences[0] == "needs speculators 0.9.0 or later; tried here with 0.9.0"
    fields, shapes = read(tmp_path)
    assert shapes == BODY | extra
    expected = {
        "architectures": [built_as],
        "speculators_model_type": kind,
        "aux_hidden_state_layer_ids": [2, 4, 6],
        "mask_token_id": 7,
        "block_size": 5,
        "draft_vocab_size": 300,
        "sample_from_anchor": first,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["speculators_config"]["verifier"]["name_or_path"] == "somebody/tiny"
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == (5 if first else 4)
    layer = fields["transformer_layer_config"]
    assert layer["model_type"] == "qwen3" and layer["rope_parameters"]["rope_theta"] == 10000.0
    check_back(stored, tmp_path, tiny_target)
    for change, message in (
        ({"sample_from_anchor": not first}, "asks for sample_from_anchor="),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids are None"),
        ({"aux_hidden_state_layer_ids": [2, 4, 9]}, "the target with 8 layers lacks some"),
        ({"speculators_model_type": "dflash2"}, "known are"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(HeadError, match=message):
            read_any(tmp_path, tiny_target.spec)


def test_a_smaller_vocabulary(tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target, draft_vocab_size=100)
    sentences = export_head(stored, "speculators", tmp_path, frozen=tiny_target.frozen_head)
    assert sentences[-1].startswith("without the target's name: engines serve it, the speculators library would not")
    assert needs_target("dflash", "speculators") and read(tmp_path)[1] == BODY | REDUCED
    check_back(stored, tmp_path, tiny_target)


def test_p_eagle(tiny_target: Target, tmp_path: Path) -> None:
    stored = test_p_eagle_form.make_head(tiny_target, mask_token_id=7)
    export_head(stored, "speculators", tmp_path, "somebody/tiny", tiny_target.frozen_head)
    fields, shapes = read(tmp_path)
    assert shapes["mask_hidden"] == (1, 1, 192) and shapes["embed_tokens.weight"] == (300, 64)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (64, 128)
    assert shapes["layers.1.self_attn.q_proj.weight"] == (64, 64)
    assert (fields["speculators_model_type"], fields["mask_token_id"]) == ("peagle", 7)
    assert fields["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5] and fields["norm_before_residual"] is False
    back = read_any(tmp_path, tiny_target.spec)
    assert back.config.depth == 5  # by what it is to draft
    check_back(stored, tmp_path, tiny_target)


def test_methods_that_it_does_not_know(tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target)
    for config, others in ((MedusaConfig(), "export it for vllm"), (DominoConfig(), "no engine here does")):
        other = type(stored)(config, stored.tensors, stored.layers, stored.target, {})
        for engine in ("speculators", "transformers"):
            with pytest.raises(ExportError, match=rf"{engine} does not know this head's method, \w+; {others}"):
                export_head(other, engine, tmp_path)  # type: ignore[arg-type]
