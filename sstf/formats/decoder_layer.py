"""The decoder layers of a head in the words of transformers' `LlamaConfig` and `Qwen3Config`, written and read.

What a configuration leaves out is what engines take for it, which are transformers' defaults, not the target's values.

`dynamic` RoPE scaling is not written: within the context it changes nothing for a head, and vLLM would scale every
position by it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from sstf.errors import HeadError
from sstf.formats.files import Published
from sstf.heads import BlockShape, EagleShape
from sstf.targets import TargetSpec
from sstf.targets.spec import ROPE_TYPES, rope_scaling


def layer_fields(shape: EagleShape | BlockShape, layers: int) -> dict[str, Any]:
    """A configuration's fields, but for rotary positions."""
    return {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # true would make SGLang tie lm_head to the target's embeddings
    }


def written_scaling(shape: EagleShape | BlockShape) -> dict[str, Any] | None:
    """Of the rotary positions, where engines need to know it."""
    scaling = shape.rope_scaling
    return dict(scaling) if scaling and scaling["rope_type"] not in ("default", "dynamic") else None


def written_rope(shape: EagleShape | BlockShape) -> dict[str, Any]:
    """`rope_parameters`, as transformers 5 has them."""
    return (written_scaling(shape) or {"rope_type": "default"}) | {"rope_theta": shape.rope_theta}


def check_sizes(head: Published, target: TargetSpec) -> None:
    """Raises HeadError for a head of another hidden size or vocabulary than the target's."""
    hidden, vocabulary = head.number("hidden_size"), head.number("vocab_size")
    reads = head.config.get("target_hidden_size") or hidden
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


def check_layers(head: Published, also: Mapping[str, bool]) -> None:
    """Refuse what no layer here has.

    Args:
        head: to be read.
        also: further fields of the configuration (`eagle_config.` before those that stand there), and whether they ask
            for what is not there.

    Raises:
        HeadError: the configuration asks for it.
    """
    config, fields = head.config, head.fields
    lacking = {
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "layer_types": "sliding_attention" in (fields.get("layer_types") or []),
        "quantization_config": bool(config.get("quantization_config")),
        "logit_scale": fields.get("logit_scale", 1.0) != 1.0,
        "partial_rotary_factor": (fields.get("partial_rotary_factor") or 1.0) != 1.0,
        **also,
    }
    for name, asked in lacking.items():
        if asked:
            inner = (config.get("eagle_config") or {}) if name.startswith("eagle_config.") else fields
            raise HeadError(
                f"its config.json asks for {name}={inner.get(name.rpartition('.')[2])!r}, which heads here do not have"
            )


def layer_settings(head: Published, target: TargetSpec) -> dict[str, Any]:
    """What makes our head's layers those of a published one: settings that are not as in the target.

    Raises:
        HeadError: a field is missing, or its rotary positions cannot be had here.
    """
    fields = head.fields
    heads, hidden = head.number("num_attention_heads"), head.number("hidden_size")
    rope = _rope(fields)
    own = {
        "intermediate_size": head.number("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or hidden // heads,
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.theta,
    }
    chosen = {name: value for name, value in own.items() if value != getattr(target, name)}
    if rope.scaling != target.rope_scaling:
        chosen["rope_scaling"] = rope.scaling or {"rope_type": "default"}
    return chosen


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
