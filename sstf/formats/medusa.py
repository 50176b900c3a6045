"""Medusa heads in the form that vLLM loads (`medusa.py`), which also reads the names of Medusa's own repository.

    blocks.<i>.layers.<j>.{weight, bias}     here `<i>.<j>.linear.{weight, bias}` in Medusa's repository
    lm_heads.<i>.weight                      `<i>.<layers>.weight` there; with `original_lm_head` one `lm_head.weight`
    token_map [draft_vocab]                  target ids; only with a smaller draft vocabulary

vLLM takes no lm_head from the target: where heads share the target's, its rows go along. It drops biases unless
`medusa_fc_bias` says that there are some, and makes `lm_heads` of the whole vocabulary whatever `token_map` says.
"""

from __future__ import annotations

import re

import torch
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import ExportError, HeadError
from sstf.formats.compatibility import needs
from sstf.formats.family import Family, Order, check_read_back
from sstf.formats.files import (
    Published,
    check_exportable,
    check_shapes,
    check_values,
    write_published,
)
from sstf.formats.vocabulary_map import MAPS, in_order
from sstf.methods import MedusaConfig
from sstf.methods.checkpoint import StoredHead
from sstf.targets import TargetSpec

OWN = re.compile(r"lm_heads\.\d+\.weight")


def write_medusa(order: Order) -> list[str]:
    """See `families.export_head`."""
    stored, config = order.stored, order.stored.config
    spec, size = stored.target, len(stored.tensors["d2t"])
    check_exportable(stored.tensors, _shapes(config, spec, size) | _map_shapes(size, spec), "Medusa heads")
    full, shared = size == spec.vocab_size, config.lm_head == "shared"
    if not full and not shared:
        raise ExportError(
            f"vLLM reads lm_heads of all {spec.vocab_size:,} tokens, these heads have their own of {size:,}; train "
            "with method.lm_head shared, or with method.draft_vocab_size left out"
        )
    sentences = needs(order.engine, ["medusa"], "medusa")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items() if name not in MAPS}
    ids = stored.tensors["d2t"] + torch.arange(size)
    if shared:
        if order.frozen is None:
            raise ExportError("vLLM takes no lm_head from the target for Medusa heads: name the target to export them")
        rows = order.frozen.lm_head.detach().cpu()
        tensors["lm_head.weight"] = (rows if full else rows[ids]).to(torch.bfloat16)
    if not full:
        tensors["token_map"] = ids
    fields = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "torch_dtype": "bfloat16",
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "truncated_vocab_size": size,
        "num_heads": config.heads,
        "num_hidden_layers": config.layers,
        "medusa_fc_bias": config.bias,
        "original_lm_head": shared,
    }
    write_published(order.folder, fields, tensors)
    check_read_back(order, read_medusa, ("heads", "layers", "bias", "lm_head"))
    return sentences


def is_medusa(head: Published) -> bool:
    """By its class or by its tensors."""
    return head.is_built_as("MedusaModel") or any(name.startswith("blocks.0.layers.0.") for name in _renamed(head))


def read_medusa(head: Published, target: TargetSpec) -> StoredHead:
    """The heads as ours.

    Raises:
        HeadError: they cannot be used here, or are for a target of another shape.
    """
    tensors = _renamed(head)
    layers = {(int(a), int(b)) for name in tensors for a, b in re.findall(r"^blocks\.(\d+)\.layers\.(\d+)\.", name)}
    if not layers:
        raise HeadError(f"they are no Medusa heads ({head.known_by}); expected blocks.0.layers.0.weight")
    if head.config.get("logit_scale", 1.0) != 1.0:
        raise HeadError(f"its config.json asks for logit_scale={head.config['logit_scale']}, which heads here lack")
    own = any(OWN.fullmatch(name) for name in tensors) and not head.config.get("original_lm_head")
    if not own and "lm_heads.0.weight" in tensors:
        tensors["lm_head.weight"] = tensors.pop("lm_heads.0.weight")
    of_target = tensors.pop("lm_head.weight", None)
    ids = tensors.pop("token_map", torch.arange(target.vocab_size)).long()
    try:
        config = MedusaConfig(
            heads=1 + max(a for a, _ in layers),
            layers=1 + max(b for _, b in layers),
            bias=any(name.endswith(".bias") for name in tensors),
            lm_head="own" if own else "shared",
            draft_vocab_size=None if len(ids) == target.vocab_size else len(ids),
        )
    except ValidationError as error:
        raise HeadError(f"it asks for what no head here can have: {error.errors()[0]['msg']}") from None
    check_shapes(tensors, _shapes(config, target, len(ids)), "Medusa", {})
    check_values(tensors)
    if of_target is not None:
        check_shapes({"lm_head.weight": of_target}, {"lm_head.weight": (len(ids), target.hidden_size)}, "Medusa", {})
        tensors["lm_head.weight"] = of_target
    by_token = [name for name in tensors if name.startswith("lm_head")]
    offsets = ids - torch.arange(len(ids))
    tensors = in_order(tensors | {"d2t": offsets}, len(ids), target.vocab_size, by_token)
    of_target = tensors.pop("lm_head.weight", None)
    run = {"form": "medusa", "layers_from": "Medusa heads read the last"}
    return StoredHead(config, tensors, (target.num_layers - 1,), target, run, lm_head=of_target)


def _renamed(head: Published) -> dict[str, Tensor]:
    """Names of Medusa's repository as vLLM's."""
    tensors = {}
    for name, tensor in head.tensors.items():
        name = name.removeprefix("medusa_heads.")
        if found := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
            name = f"blocks.{found[1]}.layers.{found[2]}.{found[3]}"
        elif found := re.fullmatch(r"(\d+)\.\d+\.weight", name):
            name = f"lm_heads.{found[1]}.weight"
        tensors[name] = tensor
    return tensors


def _shapes(config: MedusaConfig, target: TargetSpec, size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor but for the map."""
    hidden = target.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.heads):
        for j in range(config.layers):
            shapes[f"blocks.{i}.layers.{j}.weight"] = (hidden, hidden)
            if config.bias:
                shapes[f"blocks.{i}.layers.{j}.bias"] = (hidden,)
        if config.lm_head == "own":
            shapes[f"lm_heads.{i}.weight"] = (size, hidden)
    return shapes


def _map_shapes(size: int, target: TargetSpec) -> dict[str, tuple[int, ...]]:
    return {"d2t": (size,), "t2d": (target.vocab_size,)}


FAMILY = Family(
    named="Medusa",
    engines=("vllm",),
    write=write_medusa,
    claims=is_medusa,
    read=read_medusa,
    vllm={"method": "medusa"},
    with_target=("vllm",),
)
