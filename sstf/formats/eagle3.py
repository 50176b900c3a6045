"""EAGLE-3 heads in the forms that vLLM, SGLang and the speculators library load.

The tensors are those of EAGLE's published checkpoints, in bf16; speculators calls the layer `layers.0`. How an engine
counts the target's layers is in `layer_ids.py`. Every export is read back as anybody's is, and has to be the head that
it was made from: engines start what they do not find from noise and skip what they do not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sstf.config_loading import Section
from sstf.errors import DamagedDataError, ExportError, HeadError
from sstf.formats.compatibility import features_of, needs
from sstf.formats.decoder_layer import layer_fields, written_scaling
from sstf.formats.eagle3_reading import FLAGS, is_eagle3, read_eagle3, tensor_shapes
from sstf.formats.family import Family, Order
from sstf.formats.files import check_exportable, open_published, write_published
from sstf.formats.layer_ids import IDS, WRITTEN_FOR, Engine, layer_ids
from sstf.formats.speculators import speculators_fields
from sstf.formats.vocabulary_map import MAPS
from sstf.heads import EagleShape
from sstf.heads.rope import rope_frequencies
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import FrozenHead


def write_eagle3(order: Order) -> list[str]:
    """See `families.export_head`. speculators' form holds the target's embeddings: engines take the target's where a
    head brings none, but the library (0.9) trains and drafts with zeros then, without a word."""
    stored, engine, frozen = order.stored, order.engine, order.frozen
    missing = [name for name in MAPS if name not in stored.tensors]
    if missing:
        raise ExportError(f"the head cannot be exported: it lacks its vocabulary map, {' and '.join(missing)}")
    shape = shape_of(stored)
    check_exportable(stored.tensors, tensor_shapes(shape), "an EAGLE-3 head")
    sentences = needs(engine, features_of(stored.config, stored.target, full_vocabulary=is_full(shape)))
    tensors = {name: tensor if name in MAPS else tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items()}
    written = {name: tensor for name, tensor in tensors.items() if not (is_full(shape) and name in MAPS)}
    if engine == "speculators":
        written, more = as_speculators(written, frozen)
        sentences = sentences + more
    write = _speculators if engine == "speculators" else eagle_fields
    write_published(order.folder, write(stored, shape, engine, order.verifier), written)
    _check_written(order.folder, stored, shape, tensors)
    return sentences


def shape_of(stored: StoredHead) -> EagleShape:
    """Of an EAGLE-3 head that was read."""
    return Eagle3Method(stored.config).shape(stored.target, len(stored.tensors["d2t"]))


def is_full(shape: EagleShape) -> bool:
    """vLLM has no map in this case and refuses a checkpoint that holds one."""
    return shape.draft_vocab_size == shape.vocab_size


def as_speculators(tensors: dict[str, Tensor], frozen: FrozenHead | None) -> tuple[dict[str, Tensor], list[str]]:
    """By the library's names and with the target's embeddings, and what users have to know where those are missing."""
    named = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    if frozen is None:
        return named, [
            "without the target's embeddings: engines serve it, the speculators library would read zeros for them"
        ]
    return named | {"embed_tokens.weight": frozen.embeddings.detach().cpu().to(torch.bfloat16)}, []


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_written(folder: Path, stored: StoredHead, shape: EagleShape, tensors: dict[str, Tensor]) -> None:
    """Read an export as anybody's head and compare layers, shape and every value with those of the head."""
    try:
        back = read_eagle3(open_published(folder), stored.target)
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


def _flags(config: Section) -> dict[str, bool]:
    return {name: value for name, value in config if name in FLAGS}


def eagle_fields(stored: StoredHead, shape: EagleShape, engine: Engine, verifier: str | None = None) -> dict[str, Any]:
    """EAGLE's form, which vLLM and SGLang share but for the layer ids. It has no place for the target's name."""
    ids = layer_ids(stored.layers, engine)
    return layer_fields(shape, shape.num_layers) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "torch_dtype": "bfloat16",
        "target_hidden_size": shape.hidden_size,
        "rope_theta": shape.rope_theta,
        "rope_scaling": written_scaling(shape),
        "draft_vocab_size": shape.draft_vocab_size,
        "num_aux_hidden_states": len(ids),
        # vLLM's two runners read the ids in different places; a place that is not read falls back to a default.
        IDS: ids,
        "eagle_config": {IDS: ids, "layer_ids": ids, "use_aux_hidden_state": True},
        **{name: value for name, value in _flags(stored.config).items() if value},
        WRITTEN_FOR: engine,
    }


def _speculators(stored: StoredHead, shape: EagleShape, engine: Engine, verifier: str | None) -> dict[str, Any]:
    kind = speculators_fields("eagle3", "Eagle3Speculator", stored.target, shape, 3, verifier)
    return kind | eagle_speculators(stored, shape) | _flags(stored.config)


def eagle_speculators(stored: StoredHead, shape: EagleShape) -> dict[str, Any]:
    """What speculators' form of an EAGLE-3 head and of a P-EAGLE head say alike."""
    return {
        "draft_vocab_size": shape.draft_vocab_size,
        IDS: layer_ids(stored.layers, "speculators"),
        "embed_requires_grad": False,
    }


FAMILY = Family(
    named="EAGLE-3",
    engines=("vllm", "sglang", "speculators"),
    write=write_eagle3,
    claims=is_eagle3,
    read=read_eagle3,
    vllm={"method": "eagle3"},
    with_target=("speculators",),
    sglang="EAGLE3",
)
