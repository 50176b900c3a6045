"""What block heads are in the forms of others: DFlash's own, that of speculators, and that of transformers.

| form | of the layers an id k means | mask token, layers | first tensors |
|---|---|---|---|
| DFlash's | the output of 0-based layer k | in `dflash_config` (DSpark: at the top) | `fc`, `hidden_norm` |
| speculators | the residual stream after k layers | at the top, the layers as `aux_hidden_state_layer_ids` | the same |
| transformers | the output of 0-based layer k | at the top | `encoder.fc`, `encoder.output_norm_enc` |

transformers drafts from such a head by `generate(assistant_model=..., speculation_type="dflash")`. Of its models only
`MuseGlimmerAssistantModel` is one, DFlash's architecture under a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import MuseGlimmerAssistantConfig

from sstf.errors import ExportError, HeadError
from sstf.formats.decoder_layer import layer_fields, written_rope, written_scaling
from sstf.formats.family import Order
from sstf.formats.files import Published
from sstf.formats.layer_ids import layer_ids
from sstf.formats.speculators import speculators_fields
from sstf.heads import BlockShape

ASSISTANT = "MuseGlimmerAssistantModel"
IDS = "aux_hidden_state_layer_ids"
NAMES = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}  # in transformers


def own_fields(order: Order, shape: BlockShape) -> dict[str, Any]:
    """Of DFlash's form, but for what names the class, the mask token and the layers."""
    return {
        **layer_fields(shape, shape.num_layers),
        **_qwen3(shape),
        "torch_dtype": "bfloat16",
        "rope_theta": shape.rope_theta,
        "rope_scaling": written_scaling(shape),
        "num_target_layers": order.stored.target.num_layers,
        "draft_vocab_size": len(order.stored.tensors["d2t"]),
        "block_size": shape.block_size,
    }


def _qwen3(shape: BlockShape) -> dict[str, Any]:
    layers = ["full_attention"] * shape.num_layers
    return {"model_type": "qwen3", "layer_types": layers, "use_sliding_window": False}


def speculators_block(order: Order, shape: BlockShape, kind: str, built_as: str) -> dict[str, Any]:
    """Of speculators' form; see `speculators_fields`."""
    stored = order.stored
    drafts = shape.block_size - shape.first_slot
    return {
        **speculators_fields(kind, built_as, stored.target, shape, drafts, order.verifier, _qwen3(shape)),
        "draft_vocab_size": len(stored.tensors["d2t"]),
        "block_size": shape.block_size,
        "mask_token_id": int(stored.tensors["mask_token"]),
        IDS: layer_ids(stored.layers, "speculators"),
        "sample_from_anchor": shape.first_slot == 0,
        "sliding_window_non_causal": True,  # without it vLLM takes the places of a block to see only those before them
    }


def assistant_fields(order: Order, shape: BlockShape) -> dict[str, Any]:
    """Of transformers' form.

    Raises:
        ExportError: the head reads what transformers does not show it.
    """
    stored = order.stored
    last = stored.target.num_layers - 1
    if last in stored.layers:
        raise ExportError(
            f"transformers shows the output of the target's last layer, {last}, behind the final norm, this head reads "
            "it before; train with other method.layers"
        )
    return {
        **layer_fields(shape, shape.num_layers),
        "architectures": [ASSISTANT],
        "model_type": "muse_glimmer_assistant",
        "dtype": "bfloat16",
        "rope_parameters": written_rope(shape),
        "layer_types": ["full_attention"] * shape.num_layers,
        "block_size": shape.block_size,
        "mask_token_id": int(stored.tensors["mask_token"]),
        "target_layer_ids": list(stored.layers),
    }


def asked_of(head: Published, own: Mapping[str, Any]) -> dict[str, Any]:
    """The mask token and the layers, as DFlash's form has them.

    Args:
        head: in DFlash's form or in that of speculators.
        own: where DFlash's form has them.

    Raises:
        HeadError: the ids of layers are none.
    """
    if head.speculators_type is None:
        return dict(own)
    ids = head.config.get(IDS)
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise HeadError(f"its {IDS} are {ids}; expected a list of layer numbers")
    return {"mask_token_id": head.config.get("mask_token_id"), "target_layer_ids": [one - 1 for one in ids]}


def of_transformers(head: Published, vocab_size: int) -> Published:
    """A head in transformers' form as one in DFlash's; others as they are.

    Args:
        head: that was read.
        vocab_size: of the target, which the form does not hold.

    Raises:
        HeadError: its configuration is none of transformers'.
    """
    if not head.is_built_as(ASSISTANT):
        return head
    given = {"vocab_size": vocab_size, **head.config}
    try:
        config = MuseGlimmerAssistantConfig(**given).to_dict()  # what is left out is as transformers takes it
    except (ValueError, TypeError) as error:
        raise HeadError(f"its config.json is none of {ASSISTANT} ({error})") from None
    asked = {name: config[name] for name in ("mask_token_id", "target_layer_ids")}
    ours = {theirs: name for name, theirs in NAMES.items()}
    tensors = {ours.get(name, name): tensor for name, tensor in head.tensors.items()}
    # The window says nothing where no layer has one.
    return replace(head.renamed(tensors), config=config | {"dflash_config": asked, "tie_word_embeddings": False})
