"""What the rest of the project needs to know about a target without holding it in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sstf.errors import TargetError
from sstf.targets.placement import in_memory

# Ways to scale rotary positions that a head follows, in transformers' names. Others give a position another angle in a
# longer text, which no table of angles can; for such a target a head keeps plain positions.
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class TargetSpec:
    """Shape and identity of a target.

    `fingerprint` is a hash of the shape and of a sample of every parameter: two targets with the same fingerprint
    are the same model, wherever they were loaded from, and a fine-tuned sibling has another one.

    `rope_scaling` is transformers' `rope_parameters` without the base, of a `rope_type` in `ROPE_TYPES`; None is plain.
    """

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary, for manifests."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> TargetSpec:
        """Inverse of `to_json`."""
        return TargetSpec(**fields)


def describe(name: str, config: PretrainedConfig, model: nn.Module) -> TargetSpec:
    """Read the spec from a loaded transformers model.

    Raises:
        TargetError: the configuration lacks a field that a draft head is shaped by.
    """
    return spec_of(name, config, type(model).__name__, next(model.parameters()).dtype, fingerprint(model))


def spec_of(name: str, config: PretrainedConfig, architecture: str, dtype: torch.dtype, identity: str) -> TargetSpec:
    """The spec of a model of this configuration; `architecture` stands in where the configuration names none.

    Raises:
        TargetError: as `describe`.
    """
    text = config.get_text_config()
    fields = text.to_dict()

    def need(key: str) -> Any:
        if fields.get(key) is None:
            raise TargetError(
                f"target {name}: its configuration has no `{key}` (architecture {config.architectures}); "
                "draft heads need a decoder-only model with a Llama-like configuration"
            )
        return fields[key]

    num_heads = need("num_attention_heads")
    hidden = need("hidden_size")
    rope = fields.get("rope_parameters") or {}
    # Where layers differ (Gemma 3), those that see the whole text are followed.
    rope = rope.get("full_attention", rope)
    return TargetSpec(
        name=name,
        fingerprint=identity,
        architecture=(config.architectures or [architecture])[0],
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=hidden,
        num_layers=need("num_hidden_layers"),
        vocab_size=need("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or hidden // num_heads,
        intermediate_size=fields.get("intermediate_size") or 4 * hidden,
        rms_norm_eps=fields.get("rms_norm_eps") or 1e-6,
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0),
        max_position_embeddings=need("max_position_embeddings"),
        rope_scaling=rope_scaling(rope),
    )


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """See `TargetSpec.rope_scaling`, of `rope_parameters` as transformers has completed them."""
    if rope.get("rope_type") not in ROPE_TYPES:
        return None
    left_out = ("rope_theta", "type", "partial_rotary_factor")  # the last: a head turns all of its dimensions
    return {key: value for key, value in rope.items() if key not in left_out and value is not None}


def fingerprint(model: nn.Module, sample: int = 64) -> str:
    """Hash names, shapes and `sample` evenly spaced values of every parameter, as float32, whatever the dtype.

    The dtype is part of the hash: hidden states of a bf16 and of an fp32 target differ.
    """
    digest = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        flat = in_memory(model, key, parameter).reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(sample, flat.numel()), dtype=torch.float64).long()
        values = flat[picks.to(flat.device)].float().cpu().numpy().tobytes()
        digest.update(json.dumps([key, list(parameter.shape), str(parameter.dtype)]).encode())
        digest.update(values)
    return digest.hexdigest()[:16]
