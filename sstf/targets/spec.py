"""What the rest of the project needs to know about a target without holding it in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sstf.errors import TargetError


@dataclass(frozen=True)
class TargetSpec:
    """Shape and identity of a target.

    `fingerprint` is a hash of the shape and of a sample of every parameter: two targets with the same fingerprint
    are the same model, wherever they were loaded from, and a fine-tuned sibling has another one.
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
    return TargetSpec(
        name=name,
        fingerprint=fingerprint(model),
        architecture=(config.architectures or [type(model).__name__])[0],
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
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
    )


def fingerprint(model: nn.Module, sample: int = 64) -> str:
    """Hash names, shapes and `sample` evenly spaced values of every parameter, as float32, whatever the dtype.

    The dtype is part of the hash: hidden states of a bf16 and of an fp32 target differ.
    """
    digest = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(sample, flat.numel()), dtype=torch.float64).long()
        values = flat[picks.to(flat.device)].float().cpu().numpy().tobytes()
        digest.update(json.dumps([key, list(parameter.shape), str(parameter.dtype)]).encode())
        digest.update(values)
    return digest.hexdigest()[:16]
