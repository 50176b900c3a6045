"""P-EAGLE heads in the form that vLLM loads: EAGLE-3's (`eagle3.py`), and

    mask_hidden [n * hidden]      what drafted positions read in place of features
    pard_token (ptd_token_id)     in the configuration: the token whose embedding they read

vLLM drafts so with `"parallel_drafting": true` in its speculative configuration; without, it skips `mask_hidden`. The
form does not say how deep a head was trained; an export of ours does, in a key of its own. Speculators' form has the
depth, and calls the token `mask_token_id`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from sstf.errors import HeadError
from sstf.formats.compatibility import needs
from sstf.formats.decoder_layer import check_layers, check_sizes, layer_settings
from sstf.formats.eagle3 import as_speculators, eagle_fields, eagle_speculators, is_full
from sstf.formats.eagle3_reading import FLAGS, named_as_ours
from sstf.formats.family import Family, Order, check_read_back
from sstf.formats.files import Published, check_exportable, check_shapes, check_values, write_published
from sstf.formats.layer_ids import read_layers
from sstf.formats.speculators import speculators_fields, told_depth
from sstf.formats.vocabulary_map import MAPS, in_order
from sstf.heads import EagleShape, PEagleHead
from sstf.methods import PEagleConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.p_eagle import PEagleMethod
from sstf.targets import TargetSpec

DEPTH = "sstf_depth"


def write_p_eagle(order: Order) -> list[str]:
    """See `families.export_head`."""
    stored = order.stored
    method = PEagleMethod(stored.config)
    shape, mask_token = method.shape(stored.target, len(stored.tensors["d2t"])), method.mask_token(stored.target)
    check_exportable(stored.tensors, tensor_shapes(shape), "a P-EAGLE head")
    full = is_full(shape)
    wanted = ["p_eagle"] + ["full_vocabulary"] * full + ["several_layers"] * (shape.num_layers > 1)
    wanted += ["other_layer_count"] * (order.engine == "speculators" and len(stored.layers) != 3)
    sentences = needs(order.engine, wanted)
    tensors = {
        name: tensor if name in MAPS else tensor.to(torch.bfloat16)
        for name, tensor in stored.tensors.items()
        if not (full and name in MAPS)  # vLLM has no map then, and refuses one
    }
    depth = stored.config.depth
    if order.engine == "speculators":
        tensors, more = as_speculators(tensors, order.frozen)
        sentences = sentences + more
        tensors["mask_hidden"] = tensors["mask_hidden"].view(1, 1, -1)
        kind = speculators_fields("peagle", "PEagleSpeculator", stored.target, shape, depth, order.verifier)
        fields = kind | eagle_speculators(stored, shape) | {"mask_token_id": mask_token} | dict.fromkeys(FLAGS, False)
    else:
        fields = eagle_fields(stored, shape, order.engine) | {"pard_token": mask_token, DEPTH: depth}
    write_published(order.folder, fields, tensors)
    told = stored.config.model_copy(update={"mask_token_id": mask_token})
    check_read_back(
        replace(order, stored=replace(stored, config=told)), read_p_eagle, ("num_layers", "mask_token_id", "depth")
    )
    return sentences


def is_p_eagle(head: Published) -> bool:
    """By its kind in speculators' form, else by the tensor that it alone has."""
    if head.speculators_type is not None:
        return head.speculators_type == "peagle"
    return "mask_hidden" in head.tensors


def read_p_eagle(head: Published, target: TargetSpec) -> StoredHead:
    """The head as one of ours.

    Raises:
        HeadError: it cannot be used here, or is for a target of another shape.
    """
    config = head.config
    check_sizes(head, target)
    eagle = config.get("eagle_config") or {}
    check_layers(head, {name: bool(config.get(name) or eagle.get(name)) for name in FLAGS})
    if unlike := layer_settings(head, target):
        name, value = next(iter(unlike.items()))
        raise HeadError(f"its layers have {name}={value!r}, those of P-EAGLE heads here are as in the target")
    mask_token = next(
        (config[name] for name in ("pard_token", "ptd_token_id", "mask_token_id") if name in config), None
    )
    if type(mask_token) is not int or not 0 <= mask_token < target.vocab_size:
        raise HeadError(f"its pard_token is {mask_token!r}; expected a token of the target's {target.vocab_size:,}")
    layers, why = read_layers(dict(config), target.num_layers)
    size = config.get("draft_vocab_size") or target.vocab_size
    settings: dict[str, Any] = {
        "layers": layers,
        "num_layers": head.fields.get("num_hidden_layers", 1),
        "draft_vocab_size": None if size == target.vocab_size else size,
        "mask_token_id": mask_token,
    }
    if depth := config.get(DEPTH, told_depth(config)):
        settings["depth"] = depth
    try:
        own = PEagleConfig.model_validate(settings)
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None
    shape = PEagleMethod(own).shape(target, size)
    tensors = named_as_ours(head)
    tensors["mask_hidden"] = tensors["mask_hidden"].reshape(-1)
    embeddings = tensors.pop("embed_tokens.weight", None)
    expected = tensor_shapes(shape)
    lacking = [name for name in MAPS if name not in tensors and (name == "t2d" or is_full(shape))]
    check_shapes(tensors, {name: size for name, size in expected.items() if name not in lacking}, "P-EAGLE", {})
    check_values(tensors, MAPS)
    tensors = in_order(tensors, shape.draft_vocab_size, shape.vocab_size)
    return StoredHead(own, tensors, layers, target, {"form": head.form, "layers_from": why}, embeddings)


def tensor_shapes(shape: EagleShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head, by its published name."""
    with torch.device("meta"):
        embeddings = torch.empty(shape.vocab_size, shape.hidden_size)
        head = PEagleHead(shape, embeddings, torch.arange(shape.draft_vocab_size), 0)
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


FAMILY = Family(
    named="P-EAGLE",
    engines=("vllm", "speculators"),
    write=write_p_eagle,
    claims=is_p_eagle,
    read=read_p_eagle,
    vllm={"method": "eagle3", "parallel_drafting": True},
    with_target=("speculators",),
)
