"""The form of the speculators library 0.9, which vLLM serves too: what its heads of every kind say alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sstf.formats.decoder_layer import layer_fields, written_rope
from sstf.heads import BlockShape, EagleShape
from sstf.targets import TargetSpec


def speculators_fields(
    kind: str,
    built_as: str,
    target: TargetSpec,
    shape: EagleShape | BlockShape,
    depth: int,
    verifier: str | None,
    layer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A configuration's fields that all kinds have.

    Args:
        kind: the library's name of the method.
        built_as: its class in the configuration.
        target: of the head.
        shape: of the head.
        depth: tokens that it is to draft, where a user does not say.
        verifier: see `verifier_of`.
        layer: fields of the layers that are not those of a Llama.
    """
    return {
        "architectures": [built_as],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": depth,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier_of(target, verifier), "architectures": [target.architecture]},
        },
        "transformer_layer_config": {
            **layer_fields(shape, shape.num_layers),
            "rope_parameters": written_rope(shape),
            **(layer or {}),
        },
        "target_hidden_size": shape.hidden_size,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def verifier_of(target: TargetSpec, named: str | None) -> str | None:
    """The target as users load it: the name that was given, or its own where that is one of a hub."""
    return named or (target.name if "/" in target.name else None)


def told_depth(config: Mapping[str, Any]) -> int | None:
    """How many tokens a head is to draft; None where it does not say."""
    proposals = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    depth = proposals[0].get("speculative_tokens")
    return depth if type(depth) is int else None
