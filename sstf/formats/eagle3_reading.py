"""Reads EAGLE-3 heads that others published, in EAGLE's form, which SGLang, SpecForge and vLLM share, or in that of
speculators.

A head is read whole or refused: what a configuration asks for and this project's head lacks, a tensor too many or too
few, a map that does not fit its vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sstf.errors import HeadError
from sstf.formats.decoder_layer import check_layers, check_sizes, layer_settings
from sstf.formats.files import Published, check_shapes, check_values
from sstf.formats.layer_ids import read_layers
from sstf.formats.vocabulary_map import MAPS, in_order
from sstf.heads import Eagle3Head, EagleShape
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import TargetSpec

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
HINTS = {"input_norm": "norm_before_fc", "fc_norm": "fc_norm"}  # tensors, and the flag that asks for them
# Tensors that do not belong to the head: the target's, and a table that is computed.
LEFT_OUT = ("verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq")
CLASSES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3DraftModel", "Eagle3Speculator")


def is_eagle3(head: Published) -> bool:
    """Whether it is, or says to be, an EAGLE-3 head that drafts token after token."""
    if head.speculators_type is not None:
        return head.speculators_type == "eagle3"
    if "mask_hidden" in head.tensors:
        return False
    return head.is_built_as(*CLASSES) or ("fc.weight" in head.tensors and "lm_head.weight" in head.tensors)


def read_eagle3(head: Published, target: TargetSpec) -> StoredHead:
    """The head as one of ours.

    Raises:
        HeadError: it cannot be used here, or is for a target of another shape.
    """
    tensors = named_as_ours(head)
    _check_kind(head, tensors)
    layers, why = read_layers(dict(head.config), target.num_layers)
    settings = _settings(head, layers, target)
    shape = Eagle3Method(settings).shape(target, settings.draft_vocab_size)
    embeddings = tensors.pop("embed_tokens.weight", None)
    expected = tensor_shapes(shape)
    if shape.draft_vocab_size == shape.vocab_size and "d2t" not in tensors:
        del expected["d2t"]
    if "t2d" not in tensors:
        del expected["t2d"]  # it says again what d2t says
    check_shapes(tensors, expected, "EAGLE-3", HINTS)
    check_values(tensors, MAPS)
    tensors |= in_order(tensors, shape.draft_vocab_size, shape.vocab_size)
    return StoredHead(settings, tensors, layers, target, {"form": head.form, "layers_from": why}, embeddings)


def _check_kind(head: Published, tensors: dict[str, Tensor]) -> None:
    """Raises HeadError for what is no EAGLE-3 head, and for what this project's head lacks."""
    config = head.config
    if "fc.weight" not in tensors or not any(name.startswith("midlayer.") for name in tensors):
        raise HeadError(
            f"it is no EAGLE-3 head ({head.known_by}); expected fc.weight and a decoder layer, midlayer or layers.0"
        )
    eagle = config.get("eagle_config") or {}
    check_layers(
        head,
        {
            "parallel_drafting": bool(config.get("parallel_drafting")),
            "eagle_config.use_aux_hidden_state": eagle.get("use_aux_hidden_state", True) is not True,
        },
    )
    if head.speculators_type is not None and "norm_before_residual" not in config:
        raise HeadError(
            "its config.json lacks norm_before_residual, which speculators takes for false and vLLM for true; add the "
            "one that it was trained with"
        )


def tensor_shapes(shape: EagleShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head, by its published name."""
    with torch.device("meta"):
        embeddings = torch.empty(shape.vocab_size, shape.hidden_size)
        head = Eagle3Head(shape, embeddings, torch.arange(shape.draft_vocab_size))
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


def named_as_ours(head: Published) -> dict[str, Tensor]:
    """Its tensors, by the names that heads here have, without those that do not belong to it."""
    named = {
        "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: tensor
        for name, tensor in head.tensors.items()
    }
    return {name: tensor for name, tensor in named.items() if name not in LEFT_OUT}


def _settings(head: Published, layers: tuple[int, ...], target: TargetSpec) -> Eagle3Config:
    """What makes our head of the target into this one."""
    check_sizes(head, target)
    chosen = layer_settings(head, target)
    eagle = head.config.get("eagle_config") or {}
    flags: dict[str, Any] = {name: bool(eagle.get(name, head.config.get(name, False))) for name in FLAGS}
    size = head.config.get("draft_vocab_size") or target.vocab_size
    try:
        count = head.fields.get("num_hidden_layers", 1)
        own: dict[str, Any] = {"layers": layers, "draft_vocab_size": size, "num_layers": count}
        return Eagle3Config.model_validate(own | chosen | flags)
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None
