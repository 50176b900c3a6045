"""DFlash heads in the form of DFlash's repository, which vLLM (`qwen3_dflash.py`) and SGLang (`dflash.py`) load, and in
those of speculators and transformers (`block_forms.py`).

    fc.weight [hidden, n * hidden], hidden_norm.weight, norm.weight
    layers.<i>.{input_layernorm, post_attention_layernorm, self_attn.{q,k,v,o}_proj, self_attn.{q,k}_norm, mlp.*}
    d2t, lm_head.weight      only with a smaller draft vocabulary, which vLLM and speculators read

`target_layer_ids` are 0-based layer outputs, as ours. Engines mask with the embedding of `mask_token_id`, and take the
length of a block from how many tokens they are to draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import ExportError, HeadError
from sstf.formats.block_forms import (
    ASSISTANT,
    NAMES,
    asked_of,
    assistant_fields,
    of_transformers,
    own_fields,
    speculators_block,
)
from sstf.formats.compatibility import needs
from sstf.formats.decoder_layer import check_layers, check_sizes, layer_settings
from sstf.formats.family import Family, Order, check_read_back
from sstf.formats.files import Published, check_exportable, check_shapes, check_values, write_published
from sstf.formats.speculators import verifier_of
from sstf.formats.vocabulary_map import MAPS, in_order
from sstf.heads import BlockHead, BlockShape
from sstf.methods import DFlashConfig
from sstf.methods.block import block_shape
from sstf.methods.checkpoint import StoredHead
from sstf.targets import TargetSpec

TOKENS = (*MAPS, "mask_token")
# What a form has to tell of a head.
SETTINGS = (
    "block_size", "num_layers", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps",
)  # fmt: skip


def write_dflash(order: Order) -> list[str]:
    """See `families.export_head`."""
    stored = order.stored
    shape = block_shape(stored.config, stored.target, first_slot=1)
    check_exportable(stored.tensors, dflash_shapes(shape, len(stored.tensors["d2t"])), "a DFlash head")
    asked = {"mask_token_id": int(stored.tensors["mask_token"]), "target_layer_ids": list(stored.layers)}
    match order.engine:
        case "transformers":
            fields = assistant_fields(order, shape)
        case "speculators":
            fields = speculators_block(order, shape, "dflash", "DFlashSpeculator")
        case _:
            fields = own_fields(order, shape) | {"architectures": ["DFlashDraftModel"], "dflash_config": asked}
    return write_block(order, shape, fields, "dflash", read_dflash)


def write_block(order: Order, shape: BlockShape, fields: Mapping[str, Any], method: str, read: Any) -> list[str]:
    """Write a block head that was found whole, and read it back.

    Args:
        order: what is to be written.
        shape: of the head.
        fields: of the configuration.
        method: in the words of the table of facts.
        read: of its family.

    Returns:
        What users have to know.

    Raises:
        ExportError: as `families.export_head`.
    """
    stored, full = order.stored, len(order.stored.tensors["d2t"]) == shape.vocab_size
    form = order.engine if order.engine in ("speculators", "transformers") else "dflash"
    sentences = needs(order.engine, [method] + ["smaller_vocabulary"] * (not full), form)
    if form == "speculators" and verifier_of(stored.target, order.verifier) is None:
        sentences.append(
            "without the target's name: engines serve it, the speculators library would not find its embeddings"
        )
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items() if name not in TOKENS}
    if not full:
        tensors |= _of_vocabulary(order)
    if form == "transformers":
        tensors = {NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    write_published(order.folder, fields, tensors)
    check_read_back(order, read, SETTINGS, TOKENS)
    return sentences


def _of_vocabulary(order: Order) -> dict[str, Tensor]:
    """The map of a smaller draft vocabulary, and the target's rows for it, which engines do not choose themselves."""
    if order.frozen is None:
        raise ExportError(
            f"{order.engine} takes the target's lm_head whole, this head drafts from fewer tokens: name the target to "
            "export it"
        )
    maps = {name: order.stored.tensors[name] for name in MAPS}
    ids = maps["d2t"] + torch.arange(len(maps["d2t"]))
    return maps | {"lm_head.weight": order.frozen.lm_head.detach().cpu()[ids].to(torch.bfloat16)}


def is_dflash(head: Published) -> bool:
    """By its class, or by tensors that no other head has together."""
    if head.speculators_type is not None:
        return head.speculators_type == "dflash"
    return head.is_built_as("DFlashDraftModel", ASSISTANT) or (
        {"hidden_norm.weight", "fc.weight", "layers.0.self_attn.q_norm.weight"} <= head.tensors.keys()
        and not any(name.startswith("markov_head.") for name in head.tensors)
    )


def read_dflash(head: Published, target: TargetSpec) -> StoredHead:
    """The head as one of ours.

    Raises:
        HeadError: it cannot be used here, or is for a target of another shape.
    """
    head = of_transformers(head, target.vocab_size)
    asked = asked_of(head, head.config.get("dflash_config") or {})
    if head.config.get("sample_from_anchor"):
        raise HeadError("its config.json asks for sample_from_anchor=True, which DFlash heads here do not have")
    if unknown := asked.keys() - {"mask_token_id", "target_layer_ids"}:
        name = min(unknown)
        raise HeadError(f"its dflash_config asks for {name}={asked[name]!r}, which heads here do not have")
    try:
        config = DFlashConfig.model_validate(block_settings(head, asked, target))
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None
    size = min(target.vocab_size, config.vocabulary)
    return read_block(head, target, config, dflash_shapes(block_shape(config, target, first_slot=1), size))


def block_settings(head: Published, asked: Mapping[str, Any], target: TargetSpec) -> dict[str, Any]:
    """Of any block head.

    Args:
        head: to be read.
        asked: where its layers and its mask token are named.
        target: of the head.

    Raises:
        HeadError: something is not named, or is not to be had here.
    """
    check_sizes(head, target)
    check_layers(head, {})
    layers, mask_token = asked.get("target_layer_ids"), asked.get("mask_token_id")
    if not isinstance(layers, list) or not all(type(i) is int for i in layers) or layers != sorted(set(layers)):
        raise HeadError(f"its target_layer_ids are {layers}; expected different layers in ascending order")
    if not layers or layers[0] < 0 or layers[-1] >= target.num_layers:
        raise HeadError(f"it reads the layers {layers}, of which the target with {target.num_layers} layers lacks some")
    if type(mask_token) is not int or not 0 <= mask_token < target.vocab_size:
        raise HeadError(f"its mask_token_id is {mask_token!r}; expected a token of the target's {target.vocab_size:,}")
    size = len(head.tensors["d2t"]) if "d2t" in head.tensors else target.vocab_size
    return {
        "layers": tuple(layers),
        "mask_token_id": mask_token,
        "num_layers": head.number("num_hidden_layers"),
        "block_size": head.number("block_size"),
        "draft_vocab_size": None if size == target.vocab_size else size,
        **layer_settings(head, target),
    }


def read_block(
    head: Published,
    target: TargetSpec,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    by_draft_token: tuple[str, ...] = (),
) -> StoredHead:
    """A block head with settings that are known.

    Args:
        head: to be read.
        target: of the head.
        config: of its method.
        shapes: of the tensors that a head of ours has.
        by_draft_token: tensors with a row for each draft token.

    Raises:
        HeadError: its tensors are others, or it brings an lm_head of another vocabulary.
    """
    tensors = dict(head.tensors)
    embeddings, rows = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    size = shapes["d2t"][0]
    given = {name for name in MAPS if name in tensors} | (shapes.keys() - set(TOKENS))
    check_shapes(tensors, {name: shape for name, shape in shapes.items() if name in given}, "block", {})
    check_values(tensors, MAPS)
    if rows is not None:
        check_shapes({"lm_head.weight": rows}, {"lm_head.weight": (size, target.hidden_size)}, "block", {})
        tensors["lm_head.weight"] = rows
        by_draft_token = (*by_draft_token, "lm_head.weight")
    tensors = in_order(tensors, size, target.vocab_size, by_draft_token)
    rows = tensors.pop("lm_head.weight", None)
    tensors["mask_token"] = torch.tensor(config.mask_token_id)
    if head.speculators_type is None:
        run = {"form": "dflash", "layers_from": "0-based outputs, as DFlash counts"}
    else:
        run = {"form": "speculators", "layers_from": "counted as speculators does"}
    return StoredHead(config, tensors, config.layers, target, run, embeddings, rows)


def dflash_shapes(shape: BlockShape, draft_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head of ours."""
    with torch.device("meta"):
        rows = torch.empty(shape.vocab_size, shape.hidden_size)
        head = BlockHead(shape, rows, rows, torch.arange(draft_vocab_size), 0)
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


DFLASH = Family(
    named="DFlash",
    engines=("vllm", "sglang", "speculators", "transformers"),
    write=write_dflash,
    claims=is_dflash,
    read=read_dflash,
    vllm={"method": "dflash"},
    sglang="DFLASH",
    with_target=("vllm", "speculators"),
)
