"""Export of an EAGLE-3 head in the forms that vLLM, SGLang and the speculators library load.

The tensors are those of EAGLE's published checkpoints, in bf16; speculators calls the layer `layers.0`. How an engine
counts the target's layers is in `layer_ids.py`. Every export is read back as `published.py` reads anybody's, and has to
be the head that it was made from: engines start what they do not find from noise and skip what they do not know.

`dynamic` RoPE scaling is not written: within the context it changes nothing for a head, and vLLM would scale every
position by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from sstf.config_loading import Section
from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.errors import DamagedDataError, ExportError, HeadError
from sstf.formats.compatibility import needs
from sstf.formats.layer_ids import IDS, WRITTEN_FOR, Engine, layer_ids
from sstf.formats.published import FLAGS, read_any, tensor_shapes
from sstf.heads import EagleShape
from sstf.heads.rope import rope_frequencies
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle3 import Eagle3Method

MAPS = ("d2t", "t2d")


class ExportConfig(Section):
    """Which engines to write for; one folder each."""

    engines: tuple[Engine, ...] = Field(default=("vllm", "sglang", "speculators"), min_length=1)


def export_eagle3(
    stored: StoredHead, engine: Engine, folder: Path, verifier: str | None = None, embeddings: Tensor | None = None
) -> list[str]:
    """Write `model.safetensors` (bf16) and `config.json` to `folder`, and read them back.

    Args:
        stored: a head of ours, or a published one that was read.
        engine: what is to load it.
        folder: is made, or written over.
        verifier: name of the target as users load it, which speculators' form holds; the head's own name of it, where
            that is one of a hub, if not given.
        embeddings: [vocab, hidden], the target's, which speculators' form holds: engines take the target's where a head
            brings none, but the library (0.9) trains and drafts with zeros then, without a word.

    Returns:
        Sentences: what the engine needs for this head, and what is untested.

    Raises:
        ExportError: the head is of another method, its tensors are not those that the engine's model has, no version
            of the engine runs it, or what was written reads differently.
    """
    if stored.config.kind != "eagle3":
        raise ExportError(f"{engine} loads EAGLE-3 heads in this form; this head's method is {stored.config.kind}")
    missing = [name for name in MAPS if name not in stored.tensors]
    if missing:
        raise ExportError(f"the head cannot be exported: it lacks its vocabulary map, {' and '.join(missing)}")
    shape = shape_of(stored)
    if shape.num_layers > 1:
        raise ExportError(
            f"the head cannot be exported: it has {shape.num_layers} layers, and only heads of one have a form for "
            "engines here"
        )
    _check_complete(stored, shape)
    sentences = needs(engine, stored.config, stored.target, full_vocabulary=_is_full(shape))
    tensors = {name: tensor if name in MAPS else tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items()}
    written = {
        _name(name, engine): tensor for name, tensor in tensors.items() if not (_is_full(shape) and name in MAPS)
    }
    if engine == "speculators" and embeddings is not None:
        written["embed_tokens.weight"] = embeddings.detach().cpu().to(torch.bfloat16)
    elif engine == "speculators":
        sentences = [
            *sentences,
            "without the target's embeddings: engines serve it, the speculators library would read zeros for them",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(
        folder / "model.safetensors",
        save({name: tensor.contiguous() for name, tensor in written.items()}, metadata={"format": "pt"}),
    )
    write = _speculators if engine == "speculators" else _eagle
    write_json_atomic(folder / "config.json", write(stored, shape, engine, verifier))
    _check_written(folder, stored, shape, tensors)
    return sentences


def shape_of(stored: StoredHead) -> EagleShape:
    """Of an EAGLE-3 head that was read."""
    return Eagle3Method(stored.config).shape(stored.target, len(stored.tensors["d2t"]))


def _is_full(shape: EagleShape) -> bool:
    """vLLM has no map in this case and refuses a checkpoint that holds one."""
    return shape.draft_vocab_size == shape.vocab_size


def _name(name: str, engine: Engine) -> str:
    return name.replace("midlayer.", "layers.0.") if engine == "speculators" else name


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_complete(stored: StoredHead, shape: EagleShape) -> None:
    expected = tensor_shapes(shape)
    found = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        what = ", ".join(f"{name} (found {found.get(name)}, expected {expected.get(name)})" for name in wrong)
        raise ExportError(f"the head cannot be exported, its tensors are not those of an EAGLE-3 head: {what}")
    broken = [name for name, tensor in stored.tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ExportError(f"the head cannot be exported: {', '.join(broken)} holds values that are not finite")


def _check_written(folder: Path, stored: StoredHead, shape: EagleShape, tensors: dict[str, Tensor]) -> None:
    """Read an export as anybody's head and compare layers, shape and every value with those of the head."""
    try:
        back = read_any(folder, stored.target)
    except (HeadError, DamagedDataError) as error:
        raise ExportError(f"{folder}: what was written cannot be read back ({error}); please report it") from None
    other = [
        name
        for name, tensor in tensors.items()
        if not torch.equal(back.tensors[name], tensor if name in MAPS else tensor.float())
    ]
    if back.layers != stored.layers:
        other.append(f"the layers, {list(back.layers)} in place of {list(stored.layers)}")
    found = shape_of(back)
    plain = {"rope_scaling", "max_position_embeddings"}
    other += [name for name in vars(shape) if name not in plain and getattr(found, name) != getattr(shape, name)]
    (one, scale), (two, other_scale) = _turns(shape), _turns(found)
    if not torch.equal(one, two) or scale != other_scale:
        other.append("the rotary positions")
    if other:
        raise ExportError(f"{folder}: reads differently from the head in {', '.join(other)}; please report it")


def _turns(shape: EagleShape) -> tuple[Tensor, float]:
    return rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings)


# ---- configurations --------------------------------------------------------------------------------------------------


def _layer(shape: EagleShape) -> dict[str, Any]:
    """The decoder layer in the words of transformers' `LlamaConfig`."""
    return {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
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


def _scaling(shape: EagleShape) -> dict[str, Any] | None:
    scaling = shape.rope_scaling
    return dict(scaling) if scaling and scaling["rope_type"] not in ("default", "dynamic") else None


def _flags(config: Eagle3Config) -> dict[str, bool]:
    return {name: value for name, value in config if name in FLAGS}


def _eagle(stored: StoredHead, shape: EagleShape, engine: Engine, verifier: str | None) -> dict[str, Any]:
    """EAGLE's form, which vLLM and SGLang share but for the layer ids. It has no place for the target's name."""
    ids = layer_ids(stored.layers, engine)
    return _layer(shape) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "torch_dtype": "bfloat16",
        "target_hidden_size": shape.hidden_size,
        "rope_theta": shape.rope_theta,
        "rope_scaling": _scaling(shape),
        "draft_vocab_size": shape.draft_vocab_size,
        "num_aux_hidden_states": len(ids),
        # vLLM's two runners read the ids in different places; a place that is not read falls back to a default.
        IDS: ids,
        "eagle_config": {IDS: ids, "layer_ids": ids, "use_aux_hidden_state": True},
        **{name: value for name, value in _flags(stored.config).items() if value},
        WRITTEN_FOR: engine,
    }


def _speculators(stored: StoredHead, shape: EagleShape, engine: Engine, verifier: str | None) -> dict[str, Any]:
    """The form of the speculators library 0.9, which vLLM serves too."""
    target = stored.target
    rope = (_scaling(shape) or {"rope_type": "default"}) | {"rope_theta": shape.rope_theta}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": verifier or (target.name if "/" in target.name else None),
                "architectures": [target.architecture],
            },
        },
        "transformer_layer_config": _layer(shape) | {"rope_parameters": rope},
        "draft_vocab_size": shape.draft_vocab_size,
        "target_hidden_size": shape.hidden_size,
        IDS: layer_ids(stored.layers, engine),
        **_flags(stored.config),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
