"""Attention of a verify pass: transformers' SDPA without copying grouped key/value heads.

For several query tokens under a mask on a CPU, transformers repeats the keys and values once per query head, which
copies the whole cache in every layer. torch's CPU kernel takes grouped heads as they are. Everything else goes to
transformers' own function. Registered through transformers' attention interface: no modeling code is touched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sstf_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Drop-in for transformers' `sdpa`; shapes [batch, heads, seq, head_dim], result [batch, seq, heads, head_dim]."""
    plain = not any(others.get(name) for name in ("dropout", "softcap", "position_bias"))
    if query.device.type == "cpu" and attention_mask is not None and query.shape[2] > 1 and plain:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **others
    )
    return result


def use_grouped_sdpa(model: Any) -> None:
    """Switch a loaded model from transformers' `sdpa` to the function above; other implementations stay."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_sdpa)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
