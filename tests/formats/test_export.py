"""What engines are given: every tensor, in their convention, with the numbers that were trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import speculators
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sstf.errors import ExportError
from sstf.formats import Engine, engines_of, export_head, load_any, read_any
from sstf.formats import eagle3 as export_module
from sstf.formats.files import Published
from sstf.methods import Eagle3Config, NgramConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target

ENGINES = engines_of("eagle3")
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
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def make_head(target: Target, **settings: Any) -> StoredHead:
    """Random, with values that bf16 rounds."""
    spec = target.spec
    scaling = settings.pop("target_scaling", None)
    config = Eagle3Config.model_validate({"draft_vocab_size": 200, "layers": (1, 3, 4)} | settings)
    method = Eagle3Method(config)
    torch.manual_seed(3)
    ids = torch.randperm(300)[: config.draft_vocab_size].sort().values
    spec = replace(spec, rope_scaling=scaling)
    head = method.build_head(spec, target.frozen_head, ids)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    assert config.layers
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    return StoredHead(config, tensors, config.layers, spec, {})


@pytest.fixture
def stored(tiny_target: Target) -> StoredHead:
    return make_head(tiny_target)


def theirs(name: str, engine: Engine) -> str:
    return name.replace("midlayer", "layers.0") if engine == "speculators" else name


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors(stored: StoredHead, engine: Engine, tmp_path: Path) -> None:
    export_head(stored, engine, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        theirs(name, engine): shape for name, shape in SHAPES.items()
    }
    for name, ours in stored.tensors.items():
        tensor = tensors[theirs(name, engine)]
        assert torch.equal(tensor, ours if name in ("d2t", "t2d") else ours.to(torch.bfloat16)), name
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    # An offset map: draft id + offset = target id, ascending, the ids that t2d marks.
    targets = torch.arange(200) + tensors["d2t"]
    assert targets.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("engine", "layers"), [("vllm", [2, 4, 5]), ("sglang", [1, 3, 4])])
def test_config_in_eagles_form(stored: StoredHead, engine: Engine, layers: list[int], tmp_path: Path) -> None:
    """Ours are the outputs of layers 1, 3 and 4: vLLM counts the layers before, SGLang as we do."""
    export_head(stored, engine, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
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
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": 300,
        "draft_vocab_size": 200,
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": layers,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": layers,
            "layer_ids": layers,
            "use_aux_hidden_state": True,
        },
        "sstf_export": engine,
    }


def test_config_in_speculators_form(tiny_target: Target, tmp_path: Path) -> None:
    """The keys are those that speculators 0.9 writes; `name_or_path` is how users load the target."""
    stored = make_head(tiny_target, norm_before_residual=True)
    export_head(stored, "speculators", tmp_path, "somebody/tiny")
    config, expected = json.loads((tmp_path / "config.json").read_text()), speculators([2, 4, 5]).config
    assert config.keys() == expected.keys() - {"auto_map"}
    same = expected.keys() - {"auto_map", "architectures", "draft_vocab_size", "target_hidden_size"}
    assert config["draft_vocab_size"] == 200 and config["target_hidden_size"] == 64
    for key in same - {"transformer_layer_config"}:
        assert config[key] == expected[key], key
    layer = expected["transformer_layer_config"] | {"tie_word_embeddings": False}
    assert config["transformer_layer_config"] == layer
    export_head(stored, "speculators", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] is None  # nobody else finds a target named tiny
    hub = replace(stored, target=replace(stored.target, name="org/model"))
    export_head(hub, "speculators", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/model"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (0, 2, 7)},
        {"norm_before_fc": True, "norm_output": True},
        {"fc_norm": True, "norm_output": True},
        {"intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-4},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"target_scaling": LLAMA3},
        {"target_scaling": LLAMA3, "rope_scaling": {"rope_type": "default"}},
        {"target_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"target_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"draft_vocab_size": 300},
        {"num_layers": 3},
    ],
)
def test_round_trip(settings: dict[str, Any], engine: Engine, tiny_target: Target, tmp_path: Path) -> None:
    """What comes back drafts as the head does: same logits from its module in bf16."""
    stored = make_head(tiny_target, **settings)
    export_head(stored, engine, tmp_path)
    back = read_any(tmp_path, stored.target)
    assert back.layers == stored.layers
    ours, read = (
        Eagle3Method(one.config).build_head(
            one.target, tiny_target.frozen_head, one.tensors["d2t"] + torch.arange(len(one.tensors["d2t"]))
        )
        for one in (stored, back)
    )
    ours.load_state_dict({n: t if n in ("d2t", "t2d") else t.bfloat16().float() for n, t in stored.tensors.items()})
    read.load_state_dict(back.tensors)
    features, tokens, ahead = torch.randn(200, 192), torch.randint(300, (200,)), torch.arange(200)[None]
    with torch.no_grad():
        one, other = (head.logits(head.unroll(head.fuse(features), tokens, (200,), ahead)) for head in (ours, read))
    assert torch.equal(one, other)


def test_a_head_of_one_form_becomes_another(tiny_target: Target, tmp_path: Path) -> None:
    head = speculators([2, 4, 5])
    head.config["norm_before_residual"] = False
    stored = read_any(head.write(tmp_path / "from"), tiny_target.spec)
    export_head(stored, "sglang", tmp_path / "to")
    back = read_any(tmp_path / "to", tiny_target.spec)
    assert (back.config, back.layers) == (stored.config, stored.layers)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in stored.tensors.items())
    load_any(tmp_path / "to", tiny_target)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_draft_vocabulary_has_no_map(tiny_target: Target, engine: Engine, tmp_path: Path) -> None:
    """vLLM has no parameter for it in this case and refuses a checkpoint that holds one."""
    export_head(make_head(tiny_target, draft_vocab_size=300), engine, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    full = {theirs(name, engine): shape for name, shape in SHAPES.items() if name not in ("d2t", "t2d")}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == full | {"lm_head.weight": (300, 64)}
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 300


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_refused(stored: StoredHead, name: str, tmp_path: Path) -> None:
    """vLLM would start it from noise without a word."""
    tensors = {key: tensor for key, tensor in stored.tensors.items() if key != name}
    with pytest.raises(ExportError, match=name):
        export_head(replace(stored, tensors=tensors), "vllm", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tensor_a_wrong_shape_and_a_broken_value_are_refused(stored: StoredHead, tmp_path: Path) -> None:
    extra = stored.tensors | {"fc.bias": torch.zeros(64)}
    with pytest.raises(ExportError, match=r"fc\.bias \(found \(64,\), expected None\)"):
        export_head(replace(stored, tensors=extra), "sglang", tmp_path)
    with pytest.raises(ExportError, match=r"norm\.weight \(found \(32,\), expected \(64,\)\)"):
        export_head(replace(stored, tensors=stored.tensors | {"norm.weight": torch.ones(32)}), "sglang", tmp_path)
    with pytest.raises(ExportError, match=r"norm\.weight holds values that are not finite"):
        broken = stored.tensors | {"norm.weight": torch.full((64,), torch.nan)}
        export_head(replace(stored, tensors=broken), "sglang", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_of_another_method_is_refused(stored: StoredHead, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"vllm does not know this head's method, ngram; no engine here does"):
        export_head(replace(stored, config=NgramConfig()), "vllm", tmp_path)


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (
            lambda config, tensors: config["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 3, 4]),
            "two lists",
        ),
        (lambda config, tensors: config.update(sstf_export="sglang"), r"the layers, \[2, 4, 5\]"),
        (lambda config, tensors: config.update(rope_theta=5e5), "rope_theta, the rotary positions"),
        (lambda config, tensors: config.update(rope_scaling=LLAMA3), "the rotary positions"),
        (lambda config, tensors: config.update(norm_output=True), "norm_output"),
        (lambda config, tensors: tensors["norm.weight"].mul_(2), r"norm\.weight"),
        (
            lambda config, tensors: tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].flip(0)),
            r"lm_head\.weight",
        ),
        (lambda config, tensors: tensors.pop("fc.weight"), "cannot be read back"),
    ],
)
def test_what_was_written_wrongly_is_found(
    plant: Any, named: str, stored: StoredHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between the writing and the reading back, as an exporter with a bug would make."""
    read = export_module.open_published

    def damaged(folder: Path) -> Published:
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        plant(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return read(folder)

    monkeypatch.setattr(export_module, "open_published", damaged)
    with pytest.raises(ExportError, match=named):
        export_head(stored, "vllm", tmp_path)


def test_embeddings_go_along_in_speculators_form(tiny_target: Target, tmp_path: Path) -> None:
    """Without them the library (0.9.0) takes zeros, and says nothing."""
    stored, embeddings = make_head(tiny_target), tiny_target.frozen_head.embeddings
    sentences = export_head(stored, "speculators", tmp_path / "with", frozen=tiny_target.frozen_head)
    assert torch.equal(load_file(tmp_path / "with/model.safetensors")["embed_tokens.weight"], embeddings.bfloat16())
    assert not any("embeddings" in sentence for sentence in sentences)
    sentences = export_head(stored, "speculators", tmp_path / "without")
    assert sentences[-1].startswith("without the target's embeddings: engines serve it")
    export_head(stored, "vllm", tmp_path / "vllm", frozen=tiny_target.frozen_head)
    assert "embed_tokens.weight" not in load_file(tmp_path / "vllm/model.safetensors")
