"""Export of an EAGLE-3 head in the form that vLLM and SGLang load, each with its own layer convention.

The tensors are those of EAGLE's published checkpoints. What differs is how an engine counts the target's layers:

| engine | an id k means | ours (0-based layer output i) becomes |
|---|---|---|
| vLLM | the residual stream after k layers | i + 1 |
| SGLang | the output of 0-based layer k | i |

Off by one loads, serves, and loses most of the acceptance, so the convention is stated here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from sstf.config_loading import Section
from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.errors import ExportError
from sstf.methods.checkpoint import StoredHead

Engine = Literal["vllm", "sglang"]
LAYER_OFFSET: dict[Engine, int] = {"vllm": 1, "sglang": 0}


class ExportConfig(Section):
    """Which engines to write for; one folder each."""

    engines: tuple[Engine, ...] = Field(default=("vllm", "sglang"), min_length=1)


def export_eagle3(stored: StoredHead, engine: Engine, folder: Path) -> None:
    """Write `model.safetensors` (bf16) and `config.json` to `folder`.

    Raises:
        ExportError: the head is of another method, or its tensors are not those that the engine's model has.
    """
    if stored.config.kind != "eagle3":
        raise ExportError(f"{engine} loads EAGLE-3 heads in this form; this head's method is {stored.config.kind}")
    tensors = {
        name: tensor if name in ("d2t", "t2d") else tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items()
    }
    if "d2t" not in tensors or "t2d" not in tensors:
        raise ExportError("the head cannot be exported: it lacks its vocabulary map, d2t and t2d")
    draft_vocab_size = len(tensors["d2t"])
    if draft_vocab_size == stored.target.vocab_size:
        # vLLM has no map in this case and refuses a checkpoint that holds one.
        del tensors["d2t"], tensors["t2d"]
    _check_complete(stored, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(
        folder / "model.safetensors",
        save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}),
    )
    write_json_atomic(folder / "config.json", _config(stored, engine, draft_vocab_size))


def _check_complete(stored: StoredHead, tensors: dict[str, Tensor]) -> None:
    """Engines start what they do not find from noise and skip what they do not know, so every tensor is checked."""
    expected = _shapes(stored, with_map="d2t" in tensors)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        what = ", ".join(f"{name} (found {found.get(name)}, expected {expected.get(name)})" for name in wrong)
        raise ExportError(f"the head cannot be exported, its tensors are not those of an EAGLE-3 head: {what}")
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ExportError(f"the head cannot be exported: {', '.join(broken)} holds values that are not finite")


def _shapes(stored: StoredHead, with_map: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of an EAGLE-3 checkpoint, with its shape."""
    target, draft_vocab_size = stored.target, len(stored.tensors["d2t"])
    hidden, inner = target.hidden_size, target.intermediate_size
    heads, kv_heads = target.num_heads * target.head_dim, target.num_kv_heads * target.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(stored.layers) * hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab_size, hidden),
    }
    return shapes | ({"d2t": (draft_vocab_size,), "t2d": (target.vocab_size,)} if with_map else {})


def _config(stored: StoredHead, engine: Engine, draft_vocab_size: int) -> dict[str, Any]:
    target = stored.target
    layers = [layer + LAYER_OFFSET[engine] for layer in stored.layers]
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": target.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": target.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # true would make SGLang tie lm_head to the target's embeddings
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "num_aux_hidden_states": len(layers),
        # vLLM's two runners read the ids in different places; a place that is not read falls back to a default.
        "eagle_aux_hidden_state_layer_ids": layers,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": layers,
            "layer_ids": layers,
            "use_aux_hidden_state": True,
        },
    }
