"""Frequencies of rotary positions as Llama-like models scale them (transformers' `rope_parameters`).

`dynamic` scaling begins behind the context that the model was made for. No sequence here goes beyond that, so the
frequencies are the plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_position_embeddings: int
) -> tuple[Float[Tensor, "half"], float]:
    """Radians a position for each pair of dimensions, and what cosine and sine are multiplied by.

    Args:
        head_dim: of the attention.
        theta: the base.
        scaling: see `TargetSpec.rope_scaling`; None is plain RoPE.
        max_position_embeddings: the context, which some ways of scaling start from.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    if scaling is None or scaling["rope_type"] in ("default", "dynamic"):
        return theta**-exponents, 1.0
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    with torch.device("cpu"):  # also for a head that is laid out without memory
        frequencies, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(scale)
