"""Grouped SDPA against transformers' own, and that a target really uses it."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sstf.targets import Target
from sstf.targets.attention import NAME, grouped_sdpa


class _Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_with_a_tree_mask(queries: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 16, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, 40, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, queries, 40, generator=generator) < 0.7
    mask[..., 0] = True
    found, _ = grouped_sdpa(_Module(), query, key, value, mask, scaling=0.25)
    expected, _ = sdpa_attention_forward(_Module(), query, key, value, mask, scaling=0.25)
    torch.testing.assert_close(found, expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_target_uses_it(tiny_target: Target) -> None:
    assert tiny_target.model.config._attn_implementation == NAME
