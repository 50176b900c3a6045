"""Reads EAGLE-3 heads that others published: `config.json` and `model.safetensors` in EAGLE's form, which SGLang,
SpecForge and vLLM share, or in that of speculators.

A head is read whole or refused: what a configuration asks for and this project's head lacks, a tensor too many or too
few, a map that does not fit its vocabulary. What a configuration leaves out is what engines take for it, which are the
defaults of transformers' `LlamaConfig`, not the target's values.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import LlamaConfig

from sstf.errors import DamagedDataError, HeadError
from sstf.formats.layer_ids import read_layers
from sstf.heads import Eagle3Head, EagleShape
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import DraftHead, StoredHead, for_decoding, read_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target, TargetSpec
from sstf.targets.spec import ROPE_TYPES, rope_scaling

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Tensors that do not belong to the head: the target's, and a table that is computed.
LEFT_OUT = ("verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq")


def read_any(folder: str | Path, target: TargetSpec) -> StoredHead:
    """Read a head in any form.

    Args:
        folder: of a head of ours, or of a published one.
        target: that a published head is to draft for, which it does not describe. A head of ours has its own.

    Raises:
        HeadError: no head there, one that cannot be read safely or used here, or one for a target of another shape.
        DamagedDataError: a file was cut off or altered.
    """
    folder = Path(folder)
    return read_head(folder) if (folder / "head.json").is_file() else _read_published(folder, target)


def load_any(folder: str | Path, target: Target) -> DraftHead:
    """Load a head in any form for decoding with `target`.

    Raises:
        HeadError: as `read_any`; or the head was trained for another target.
        DamagedDataError: a file was cut off or altered.
    """
    return for_decoding(read_any(folder, target.spec), target, str(folder))


def looks_published(folder: Path) -> bool:
    """Whether there is something to read, or to say why it is not read."""
    return folder.is_dir() and any(
        path.name == "config.json" or path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir()
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A published head's `config.json`.

    Raises:
        HeadError: there is none.
        DamagedDataError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HeadError(
            f"{folder}: no head there; expected head.json and head.safetensors that `sstf train` wrote, or config.json "
            "and model.safetensors of a published EAGLE-3 head"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedDataError(f"{path}: cannot be read ({error}); copy or download it again") from None
    if not isinstance(config, dict):
        raise DamagedDataError(f"{path}: no JSON object; copy or download it again")
    return config


def _read_published(folder: Path, target: TargetSpec) -> StoredHead:
    _refuse_pickles(folder)
    config = read_config(folder)
    try:
        tensors = _named_as_ours(_read_tensors(folder))
        # speculators keeps the layer's own fields in a part of their own.
        fields = config | config.get("transformer_layer_config", {})
        _check_kind(config, fields, tensors)
        layers, why = read_layers(config, target.num_layers)
        settings = _settings(config, fields, layers, target)
        shape = Eagle3Method(settings).shape(target, settings.draft_vocab_size)
        embeddings = tensors.pop("embed_tokens.weight", None)
        _check_tensors(tensors, shape)
        tensors |= _in_order(tensors, shape)
    except HeadError as error:
        raise HeadError(f"{folder}: {error}") from None
    form = "speculators" if "speculators_model_type" in config else "eagle"
    run = {"form": form, "layers_from": why}
    return StoredHead(settings, tensors, layers, target, run, embeddings)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _refuse_pickles(folder: Path) -> None:
    found = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if found and not any(folder.glob("*.safetensors")):
        raise HeadError(
            f"{folder}: its weights are {found[0]}, a pickle, which can run any code when it is read; take the "
            "publisher's model.safetensors, or convert the file on a machine with nothing to lose: "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )


def _check_kind(config: dict[str, Any], fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises HeadError for what is no EAGLE-3 head, and for what this project's head lacks."""
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise HeadError(f"it is a head of kind {kind}; expected eagle3")
    if "fc.weight" not in tensors or not any(name.startswith("midlayer.") for name in tensors):
        known = ", ".join(sorted(tensors)[:3])
        raise HeadError(
            f"it is no EAGLE-3 head ({config.get('architectures')}, with tensors such as {known}); expected fc.weight "
            "and one decoder layer, midlayer or layers.0"
        )
    if "draft_vocab_size" not in config and "d2t" not in tensors and "lm_head.weight" not in tensors:
        raise HeadError("it is a head of EAGLE or EAGLE-2, which drafts with the target's lm_head; expected EAGLE-3")
    eagle = config.get("eagle_config") or {}
    lacking = {
        "num_hidden_layers": fields.get("num_hidden_layers", 1) != 1,
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "layer_types": "sliding_attention" in (fields.get("layer_types") or []),
        "quantization_config": bool(config.get("quantization_config")),
        "logit_scale": fields.get("logit_scale", 1.0) != 1.0,
        "partial_rotary_factor": (fields.get("partial_rotary_factor") or 1.0) != 1.0,
        "parallel_drafting": bool(config.get("parallel_drafting")),
        "eagle_config.use_aux_hidden_state": eagle.get("use_aux_hidden_state", True) is not True,
    }
    for name, asked in lacking.items():
        if asked:
            inner = eagle if name.startswith("eagle_config.") else fields
            raise HeadError(
                f"its config.json asks for {name}={inner.get(name.rpartition('.')[2])!r}, which heads here do not have"
            )
    if "speculators_model_type" in config and "norm_before_residual" not in config:
        raise HeadError(
            "its config.json lacks norm_before_residual, which speculators takes for false and vLLM for true; add the "
            "one that it was trained with"
        )


def _check_tensors(tensors: dict[str, Tensor], shape: EagleShape) -> None:
    """Raises HeadError for a tensor too many, too few, of another shape, or with values that are no numbers."""
    expected = tensor_shapes(shape)
    if shape.draft_vocab_size == shape.vocab_size and "d2t" not in tensors:
        del expected["d2t"]
    if "t2d" not in tensors:
        del expected["t2d"]  # it says again what d2t says
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise HeadError(f"it lacks the tensor {name} {list(expected[name])}; copy or download it again")
        if name not in expected:
            flag = {"input_norm": "norm_before_fc", "fc_norm": "fc_norm"}.get(name.split(".")[0])
            hint = f"; its config.json does not say {flag}" if flag else ""
            raise HeadError(f"it holds the tensor {name} {list(found[name])}, which no EAGLE-3 head here has{hint}")
        if found[name] != expected[name]:
            raise HeadError(
                f"its tensor {name} has the shape {list(found[name])}, by its config.json and the target it would be "
                f"{list(expected[name])}"
            )
    for name, tensor in tensors.items():
        if name not in ("d2t", "t2d") and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise HeadError(f"its tensor {name} is of {tensor.dtype}, expected float32, bfloat16 or float16")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HeadError(f"its tensor {name} holds values that are not finite")


def tensor_shapes(shape: EagleShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head, by its published name."""
    with torch.device("meta"):
        embeddings = torch.empty(shape.vocab_size, shape.hidden_size)
        head = Eagle3Head(shape, embeddings, torch.arange(shape.draft_vocab_size))
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedDataError(f"{index}: cannot be read; copy or download it again") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(str(name)).name  # never outside the folder
        if not path.is_file():
            raise HeadError(f"no {path.name}; expected the weights of a published EAGLE-3 head there")
        try:
            tensors |= load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise DamagedDataError(f"{path}: cannot be read ({error}); copy or download it again") from None
    return tensors


def _named_as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: tensor
        for name, tensor in tensors.items()
    }
    return {name: tensor for name, tensor in named.items() if name not in LEFT_OUT}


def _settings(
    config: dict[str, Any], fields: dict[str, Any], layers: tuple[int, ...], target: TargetSpec
) -> Eagle3Config:
    """What makes our head of the target into this one."""

    def need(name: str) -> int:
        if type(fields.get(name)) is not int:
            raise HeadError(f"its config.json has {name}={fields.get(name)!r}, expected a number")
        return int(fields[name])

    hidden, vocabulary = need("hidden_size"), need("vocab_size")
    reads = config.get("target_hidden_size") or hidden
    if (hidden, reads) != (target.hidden_size, target.hidden_size):
        raise HeadError(
            f"it is of hidden size {hidden} for targets of {reads}, target {target.name} has {target.hidden_size}; "
            "name the target that it was trained for"
        )
    if vocabulary != target.vocab_size:
        raise HeadError(
            f"it was trained for a vocabulary of {vocabulary} tokens, target {target.name} has {target.vocab_size}; "
            "name the target that it was trained for"
        )
    heads = need("num_attention_heads")
    own = {
        "intermediate_size": need("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or hidden // heads,
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-6),
    }
    rope = _rope(fields)
    own["rope_theta"] = rope.theta
    chosen = {name: value for name, value in own.items() if value != getattr(target, name)}
    if rope.scaling != target.rope_scaling:
        chosen["rope_scaling"] = rope.scaling or {"rope_type": "default"}
    eagle = config.get("eagle_config") or {}
    flags = {name: bool(eagle.get(name, config.get(name, False))) for name in FLAGS}
    size = config.get("draft_vocab_size") or vocabulary
    try:
        return Eagle3Config.model_validate({"layers": layers, "draft_vocab_size": size} | chosen | flags)
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None


@dataclass(frozen=True)
class _Rope:
    theta: float
    scaling: dict[str, Any] | None


def _rope(fields: dict[str, Any]) -> _Rope:
    """Rotary positions by `rope_parameters`, or by `rope_theta` and `rope_scaling` as before transformers 5."""
    given = {name: fields[name] for name in ("rope_parameters", "rope_theta", "rope_scaling") if fields.get(name)}
    try:
        context = fields.get("max_position_embeddings") or 2048
        rope: Any = LlamaConfig(max_position_embeddings=context, **copy.deepcopy(given)).rope_parameters
        kind = rope["rope_type"]
        if kind not in (*ROPE_TYPES, "default", "mrope"):  # for text, the last is plain
            raise HeadError(f"its rotary positions are of type {kind}; expected default, {', '.join(ROPE_TYPES)}")
        return _Rope(float(rope["rope_theta"]), rope_scaling(rope))
    except (ValueError, KeyError, TypeError) as error:
        raise HeadError(f"its rotary positions cannot be read ({error}): {given}") from None


def _in_order(tensors: dict[str, Tensor], shape: EagleShape) -> dict[str, Tensor]:
    """The tensors as a head of ours has them: float32, the draft vocabulary ascending, both maps there.

    Raises:
        HeadError: the maps contradict each other or the vocabulary.
    """
    size, vocabulary = shape.draft_vocab_size, shape.vocab_size
    places = torch.arange(size)
    offsets = tensors.get("d2t", torch.zeros(size, dtype=torch.int64)).long()
    ids = places + offsets
    marked = torch.zeros(vocabulary, dtype=torch.bool)
    fits = bool(((ids >= 0) & (ids < vocabulary)).all()) and len(ids.unique()) == size
    if fits:
        marked[ids] = True
    given = tensors.get("t2d")
    if not fits or (given is not None and not torch.equal(given.bool(), marked)):
        absolute = given is not None and torch.equal(offsets.sort().values, given.nonzero()[:, 0])
        raise HeadError(
            "its d2t holds target ids; expected offsets, target id less draft id"
            if absolute
            else "its d2t does not lead to different ids of the vocabulary"
            if not fits
            else f"its d2t leads to other ids than the {int(given.bool().sum()) if given is not None else 0} that its "
            "t2d marks"
        )
    order = ids.argsort()
    floats = {name: tensor.float() for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    floats["lm_head.weight"] = floats["lm_head.weight"][order]
    return floats | {"d2t": ids[order] - places, "t2d": marked}
