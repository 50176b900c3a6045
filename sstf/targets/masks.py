"""Attention masks in the form that a target's modules take.

Batches of rows of different lengths and draft trees need masks of their own. Layers with a sliding window or with
chunks see less than full layers do: there a key is hidden by its POSITION, which for a tree node is its depth.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sstf.targets.attention import NAME as GROUPED_SDPA

BOOLEAN = ("sdpa", GROUPED_SDPA)  # implementations that take a mask of booleans; others ADD the mask to the scores


class MaskMaker:
    """Masks for one model: a tensor where all layers attend alike, a dictionary by layer type where they do not."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        fields = config.get_text_config().to_dict()
        self.window = int(fields.get("sliding_window") or 0)
        self.chunk = int(fields.get("attention_chunk_size") or 0)
        types = fields.get("layer_types") or ["sliding_attention" if self.window else "full_attention"]
        self.types: tuple[str, ...] = tuple(dict.fromkeys(types))

    @property
    def by_position(self) -> bool:
        """Whether some layers hide keys by their position."""
        return self.types != ("full_attention",)

    def __call__(
        self,
        allowed: Bool[Tensor, "batch seq visible"],
        queries: Int[Tensor, "batch seq"],
        keys: Int[Tensor, "batch visible"] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Args:
        allowed: what full attention sees.
        queries: positions of the queries.
        keys: positions of the keys; None: key j stands at position j.
        """
        if not self.by_position:
            return self._form(allowed)
        if keys is None:
            keys = torch.arange(allowed.shape[-1], device=allowed.device)[None]
        distance = queries[:, :, None] - keys[:, None]
        masks = {}
        for kind in self.types:
            if kind == "sliding_attention" and self.window:
                seen = allowed & (distance < self.window)
            elif kind == "chunked_attention" and self.chunk:
                seen = allowed & (queries[:, :, None] // self.chunk == keys[:, None] // self.chunk)
            else:
                seen = allowed
            masks[kind] = self._form(seen)
        return masks if len(masks) > 1 else masks[self.types[0]]

    def _form(self, allowed: Tensor) -> Tensor:
        allowed = allowed[:, None]  # every head alike
        if self.config._attn_implementation in BOOLEAN:
            return allowed
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(~allowed, lowest)
