"""Heads of other trainers, written here by their key lists, read for the tiny target (8 layers, vocabulary 300)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_heads import DRAFT, HIDDEN, VOCAB, Published, eagle, specforge, speculators, weights

from sstf.errors import DamagedDataError, HeadError
from sstf.formats import find_head, load_any, read_any, target_of
from sstf.heads import Eagle3Head
from sstf.methods.checkpoint import StoredHead
from sstf.targets import Target

LAYER_TENSORS = [name for name in weights("midlayer") if name.startswith("midlayer.")]


def shape_settings(stored: StoredHead) -> dict[str, object]:
    known = ("kind", "layers", "draft_vocab_size", "ttt_steps", "ttt_decay", "init", "objective")
    return {name: value for name, value in stored.config.model_dump().items() if name not in known}


@pytest.mark.parametrize(
    ("head", "layers", "settings"),
    [
        (eagle(), (1, 3, 4), {}),  # no ids: before layers 2, L//2 and L - 3
        (specforge([1, 3, 4]), (1, 3, 4), {}),
        (speculators([2, 4, 5]), (1, 3, 4), {"norm_before_residual": True}),
    ],
    ids=["eagle", "specforge", "speculators"],
)
def test_every_form_becomes_the_same_head(
    head: Published, layers: tuple[int, ...], settings: dict[str, object], tiny_target: Target, tmp_path: Path
) -> None:
    stored = read_any(head.write(tmp_path), tiny_target.spec)
    assert stored.layers == stored.config.layers == layers
    assert stored.config.draft_vocab_size == DRAFT
    assert shape_settings(stored) == settings
    assert stored.target == tiny_target.spec
    expected = weights("midlayer")
    assert stored.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored.tensors[name], tensor if name in ("d2t", "t2d") else tensor.float()), name
    loaded = load_any(tmp_path, tiny_target)
    assert isinstance(loaded.module, Eagle3Head) and loaded.name == str(tmp_path)
    assert loaded.module.draft_tokens.tolist() == list(range(0, 300, 3))
    assert find_head(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("head", "layers", "why"),
    [
        (specforge([1, 3, 4]), (1, 3, 4), "as SGLang counts"),
        (specforge([2, 4, 5]), (1, 3, 4), "as vLLM counts"),  # the usual ones, whoever wrote them
        (specforge([2, 3, 7]), (2, 3, 7), "SGLang and SpecForge do"),
        (specforge([4, 1, 6]), (1, 4, 6), "SGLang and SpecForge do"),  # engines sort
        (specforge([3, 5, 8]), (2, 4, 7), "only vLLM counts so far"),  # a target of 8 layers has no layer 8
        (specforge([0, 3, 5]), (0, 3, 5), "from 0"),
        (speculators([3, 5, 8]), (2, 4, 7), "as speculators does"),
        (speculators([1, 3, 4]), (0, 2, 3), "as speculators does"),
    ],
)
def test_layer_ids(head: Published, layers: tuple[int, ...], why: str, tiny_target: Target, tmp_path: Path) -> None:
    stored = read_any(head.write(tmp_path), tiny_target.spec)
    assert stored.layers == layers
    assert why in stored.run["layers_from"]


def test_layer_ids_where_only_vllm_reads_them(tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    head.config["eagle_aux_hidden_state_layer_ids"] = [3, 4, 7]
    assert read_any(head.write(tmp_path), tiny_target.spec).layers == (2, 3, 6)
    head.config["sstf_export"] = "sglang"  # what an export of this project says of itself
    assert read_any(head.write(tmp_path), tiny_target.spec).layers == (3, 4, 7)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 3, 9], r"reads the layers \[2, 3, 9\] .* target with 8 layers lacks some"),
        ([2, 2, 5], "expected a list of different layer numbers"),
        ("2", "expected a list of different layer numbers"),
        ([1, 3], r"fc.weight has the shape \[64, 192\], by its config.json .* \[64, 128\]"),
    ],
)
def test_layer_ids_that_do_not_fit(ids: list[int], message: str, tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=message):
        read_any(specforge(ids).write(tmp_path), tiny_target.spec)


def test_two_lists_of_layer_ids(tiny_target: Target, tmp_path: Path) -> None:
    head = specforge([1, 3, 4])
    head.config["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
    with pytest.raises(HeadError, match="names two lists of layers"):
        read_any(head.write(tmp_path), tiny_target.spec)


def test_what_a_configuration_leaves_out_is_what_engines_take(tiny_target: Target, tmp_path: Path) -> None:
    """Not the target's: this one has theta 5e5 and scales it, and another epsilon."""
    spec = replace(
        tiny_target.spec, rope_theta=5e5, rms_norm_eps=1e-5, rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    head = eagle()
    del head.config["rms_norm_eps"]
    stored = read_any(head.write(tmp_path), spec)
    assert shape_settings(stored) == {
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "default"},
    }


LONG = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, LLAMA3),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, None, None),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 128},
            None,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rotary_positions(
    fields: dict[str, object], theta: float | None, scaling: object, tiny_target: Target, tmp_path: Path
) -> None:
    head = eagle()
    head.config |= fields
    config = read_any(head.write(tmp_path), tiny_target.spec).config
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_sizes_of_its_own(tiny_target: Target, tmp_path: Path) -> None:
    head = Published(eagle().config, weights("midlayer", inner=96, heads=2, kv_heads=1, dim=24))
    head.config |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
    stored = read_any(head.write(tmp_path), tiny_target.spec)
    assert shape_settings(stored) == {"intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 24}
    module = load_any(tmp_path, tiny_target).module
    assert isinstance(module, Eagle3Head) and module.midlayer.self_attn.q_proj.weight.shape == (48, 2 * HIDDEN)


def test_norms_of_eagle_3_1(tiny_target: Target, tmp_path: Path) -> None:
    """speculators 0.9's usual head; `fc_norm` as in SpecForge's configurations."""
    head = speculators([2, 4, 5])
    head.config |= {"norm_before_fc": True, "norm_output": True}
    head.tensors["input_norm.weight"] = torch.linspace(0.5, 1.5, 3 * HIDDEN)
    stored = read_any(head.write(tmp_path / "a"), tiny_target.spec)
    assert shape_settings(stored) == {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
    assert torch.equal(stored.tensors["input_norm.weight"], head.tensors["input_norm.weight"])
    head = specforge([1, 3, 4])
    head.config |= {"fc_norm": True}
    head.tensors |= {f"fc_norm.{i}.weight": torch.full((HIDDEN,), 1.0 + i) for i in range(3)}
    stored = read_any(head.write(tmp_path / "b"), tiny_target.spec)
    assert shape_settings(stored) == {"fc_norm": True}
    module = load_any(tmp_path / "b", tiny_target).module
    assert isinstance(module, Eagle3Head) and float(module.fc_norm[2].weight[0].detach()) == 3.0


# ---- vocabulary and embeddings ---------------------------------------------------------------------------------------


def test_a_vocabulary_in_another_order(tiny_target: Target, tmp_path: Path) -> None:
    """Draft id j stands for target id ids[j]; each row of lm_head goes with its token."""
    head, order = eagle(), torch.randperm(DRAFT, generator=torch.Generator().manual_seed(0))
    ids = head.target_ids[order]
    rows = head.tensors["lm_head.weight"]
    head.tensors |= {"d2t": ids - torch.arange(DRAFT), "lm_head.weight": rows[order]}
    stored = read_any(head.write(tmp_path), tiny_target.spec)
    assert torch.equal(stored.tensors["lm_head.weight"], rows.float())
    assert (stored.tensors["d2t"] + torch.arange(DRAFT)).tolist() == list(range(0, 300, 3))


def test_without_t2d(tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    marked = head.tensors.pop("t2d")
    assert torch.equal(read_any(head.write(tmp_path), tiny_target.spec).tensors["t2d"], marked)


def test_a_full_vocabulary_needs_no_map(tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    del head.tensors["d2t"], head.tensors["t2d"], head.config["draft_vocab_size"]
    head.tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    stored = read_any(head.write(tmp_path), tiny_target.spec)
    assert not stored.tensors["d2t"].any() and stored.tensors["t2d"].all()
    module = load_any(tmp_path, tiny_target).module
    assert isinstance(module, Eagle3Head) and len(module.draft_tokens) == VOCAB


def test_embeddings_beside_the_head(tiny_target: Target, tmp_path: Path) -> None:
    """The target's, rounded, are dropped; others are refused."""
    head, own = speculators([2, 4, 5]), tiny_target.frozen_head.embeddings
    head.tensors["embed_tokens.weight"] = own.bfloat16()
    module = load_any(head.write(tmp_path), tiny_target).module
    assert isinstance(module, Eagle3Head)
    assert module.embeddings.data_ptr() == own.data_ptr() and "embed_tokens.weight" not in module.state_dict()
    head.tensors["embed_tokens.weight"] = own.clone()
    head.tensors["embed_tokens.weight"][7] *= 1.02
    with pytest.raises(HeadError, match="embeddings of its own: 1 of 300 tokens"):
        load_any(head.write(tmp_path), tiny_target)


# ---- bad input -------------------------------------------------------------------------------------------------------

Change = Callable[[Published], object]


def scaled(name: str, value: float) -> Change:
    return lambda head: head.tensors.update({name: head.tensors[name] * value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.config.update(vocab_size=301), "a vocabulary of 301 tokens, target tiny has 300"),
        (lambda h: h.config.update(hidden_size=32), "hidden size 32 for targets of 32, target tiny has 64"),
        (lambda h: h.config.update(target_hidden_size=128), "hidden size 64 for targets of 128"),
        (lambda h: h.config.pop("hidden_size"), "hidden_size=None, expected a number"),
        (lambda h: h.config.update(num_hidden_layers=2), "lacks the tensor layers.1.input_layernorm.weight"),
        (lambda h: h.config.update(hidden_act="gelu"), "asks for hidden_act='gelu'"),
        (lambda h: h.config.update(attention_bias=True), "asks for attention_bias=True"),
        (lambda h: h.config.update(tie_word_embeddings=True), "asks for tie_word_embeddings=True"),
        (lambda h: h.config.update(quantization_config={"bits": 4}), "asks for quantization_config"),
        (
            lambda h: h.config.update(eagle_config={"use_aux_hidden_state": False}),
            "asks for eagle_config.use_aux_hidden_state=False",
        ),
        (lambda h: h.config.update(rope_scaling=LONG), "of type longrope"),
        (
            lambda h: h.config.update(speculators_model_type="dflash2"),
            "speculators_model_type dflash2, with tensors such as",
        ),
        (lambda h: h.config.update(norm_before_fc=True, fc_norm=True), "norm the same values"),
        (lambda h: h.config.update(norm_before_fc=True), r"lacks the tensor input_norm.weight \[192\]"),
        (
            lambda h: h.tensors.update({"input_norm.weight": torch.ones(192)}),
            r"holds the tensor input_norm.weight \[192\].* does not say norm_before_fc",
        ),
        (lambda h: h.tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(16)}), "holds the tensor midlayer"),
        (lambda h: h.tensors.update({"norm.weight": torch.ones(32)}), r"norm.weight has the shape \[32\]"),
        (scaled("norm.weight", float("nan")), "norm.weight holds values that are not finite"),
        (
            lambda h: h.tensors.update({"norm.weight": torch.ones(64, dtype=torch.float8_e4m3fn)}),
            "norm.weight is of torch.float8_e4m3fn, expected float32",
        ),
        (lambda h: h.tensors.update(d2t=h.target_ids), "d2t holds target ids; expected offsets"),
        (lambda h: h.tensors["d2t"].__setitem__(5, 0), "d2t leads to other ids than the 100 that its t2d marks"),
        (lambda h: h.tensors["d2t"].__setitem__(99, 300), "does not lead to different ids of the vocabulary"),
        (lambda h: h.tensors["d2t"].__setitem__(0, 3), "does not lead to different ids of the vocabulary"),
        (lambda h: h.tensors["t2d"].__setitem__(1, True), "d2t leads to other ids than the 101 that its t2d marks"),
    ],
)
def test_what_does_not_fit_is_refused(change: Change, message: str, tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    change(head)
    with pytest.raises(HeadError, match=message) as caught:
        read_any(head.write(tmp_path), tiny_target.spec)
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*LAYER_TENSORS, "fc.weight", "norm.weight", "lm_head.weight", "d2t"])
def test_a_missing_tensor(name: str, tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    del head.tensors[name]
    with pytest.raises(HeadError, match=f"lacks the tensor {name}" if name != "fc.weight" else "no EAGLE-3 head"):
        read_any(head.write(tmp_path), tiny_target.spec)


def test_speculators_without_the_flag_that_its_readers_disagree_on(tiny_target: Target, tmp_path: Path) -> None:
    head = speculators([2, 4, 5])
    del head.config["norm_before_residual"]
    with pytest.raises(HeadError, match="speculators takes for false and vLLM for true"):
        read_any(head.write(tmp_path), tiny_target.spec)


def test_a_whole_model_is_no_head(tiny_target: Target, tiny_target_folder: Path) -> None:
    with pytest.raises(
        HeadError, match=r"no head of a kind known here \(\['LlamaForCausalLM'\], with tensors such as lm_head"
    ):
        read_any(tiny_target_folder, tiny_target.spec)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "head.pt", "last.ckpt"])
def test_a_pickle_is_not_opened(name: str, tiny_target: Target, tmp_path: Path) -> None:
    eagle().write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(HeadError, match=rf"weights are {name}, a pickle, which can run any code") as caught:
        read_any(find_head(str(tmp_path)), tiny_target.spec)
    assert caught.value.exit_code == 2


def test_damaged_files(tiny_target: Target, tmp_path: Path) -> None:
    folder = eagle().write(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for broken in (b"", whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"}" + whole[9:]):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(DamagedDataError, match=r"model\.safetensors: cannot be read"):
            read_any(folder, tiny_target.spec)
    for text in ("{", "[]", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(DamagedDataError, match=r"config\.json: (cannot be read|no JSON object)"):
            read_any(folder, tiny_target.spec)


def test_no_head_there(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"no head there; expected head\.json"):
        read_any(tmp_path, tiny_target.spec)
    with pytest.raises(HeadError, match="no head there"):
        find_head(str(tmp_path))
    eagle().write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HeadError, match=r"no model\.safetensors"):
        read_any(tmp_path, tiny_target.spec)


def test_weights_in_several_files(tiny_target: Target, tmp_path: Path) -> None:
    head = eagle()
    names = sorted(head.tensors)
    index = {}
    for i, part in enumerate((names[:5], names[5:])):
        folder = Published({}, {name: head.tensors[name] for name in part}).write(tmp_path / "scratch")
        (folder / "model.safetensors").rename(tmp_path / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(head.config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert read_any(tmp_path, tiny_target.spec).tensors.keys() == head.tensors.keys()


def test_the_target_of_a_published_head(tiny_target: Target, tiny_target_folder: Path, tmp_path: Path) -> None:
    folder = eagle().write(tmp_path / "eagle")
    with pytest.raises(HeadError, match="names no target; say --target NAME"):
        target_of(folder)
    assert target_of(folder, str(tiny_target_folder)).spec.hidden_size == HIDDEN
    head = speculators([2, 4, 5])
    head.config["speculators_config"]["verifier"]["name_or_path"] = str(tiny_target_folder)
    assert target_of(head.write(tmp_path / "speculators")).spec.name == "tiny"
