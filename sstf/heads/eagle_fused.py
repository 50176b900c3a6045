"""EAGLE heads in the form that drafts: the same arithmetic as `eagle.py` in fewer and larger operations.

Query, key and value are one matrix product, gate and up another; rotary tables are made once; grouped heads go to
the attention kernel as they are. A draft pass is short, so every operation saved counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sstf.heads.eagle import Eagle3Head, EagleLayer, EagleModule, PlainLayer, rotate
from sstf.targets import PreallocatedCache


class FusedLayers:
    """Inference over the weights of decoder layers as they are now; a head that is trained further needs a new one."""

    def __init__(self, head: EagleModule, layers: Sequence[EagleLayer | PlainLayer]) -> None:
        def joined(names: Sequence[str]) -> list[Tensor]:
            weights = [dict(layer.named_parameters()) for layer in layers]
            return [torch.cat([of[f"{name}_proj.weight"] for name in names]).detach() for of in weights]

        self.shape, self.rope = head.shape, head.rope
        self.layers = layers
        self.qkv = joined(["self_attn.q", "self_attn.k", "self_attn.v"])
        self.gate_up = joined(["mlp.gate", "mlp.up"])
        self.cos = self.sin = torch.empty(0)

    def make_rope(self, capacity: int) -> None:
        """Rotary tables for positions below `capacity`."""
        positions = torch.arange(capacity, device=self.qkv[0].device)
        self.cos, self.sin = self.rope(positions)

    def attention(
        self,
        index: int,
        x: Float[Tensor, "batch seq width"],
        residual: Float[Tensor, "batch seq hidden"],
        positions: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq visible"],
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """The first half of a layer that reads x: what its MLP reads and adds to."""
        shape = self.shape
        query_key = shape.num_heads + shape.num_kv_heads
        qkv = torch.unflatten(F.linear(x, self.qkv[index]), -1, (-1, shape.head_dim))  # [batch, seq, all heads, dim]
        turned = rotate(qkv[:, :, :query_key], self.cos[positions], self.sin[positions]).transpose(1, 2)
        keys, values = cache.update(turned[:, shape.num_heads :], qkv[:, :, query_key:].transpose(1, 2), index)
        attended = F.scaled_dot_product_attention(
            turned[:, : shape.num_heads], keys, values, attn_mask=mask[:, None], enable_gqa=True
        )
        return residual + F.linear(attended.transpose(1, 2).flatten(2), self.layers[index].self_attn.o_proj.weight)

    def finish(self, r: Float[Tensor, "batch seq hidden"], index: int = 0) -> Float[Tensor, "batch seq hidden"]:
        """The second half: the MLP and its residual."""
        layer = self.layers[index]
        gate, up = F.linear(self._normed(r, layer.post_attention_layernorm), self.gate_up[index]).chunk(2, -1)
        return r + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)

    def plain(
        self, index: int, x: Tensor, positions: Tensor, mask: Tensor, cache: PreallocatedCache
    ) -> Float[Tensor, "batch seq hidden"]:
        """A whole `PlainLayer`."""
        layer = self.layers[index]
        assert isinstance(layer, PlainLayer)
        normed = self._normed(x, layer.input_layernorm) if layer.input_norm else x
        return self.finish(self.attention(index, normed, x, positions, mask, cache), index)

    def _normed(self, x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        assert norm.weight is not None
        return self._norm(x, norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)


class FusedEagle(FusedLayers):
    """An EAGLE-3 head."""

    def __init__(self, head: Eagle3Head) -> None:
        super().__init__(head, [head.midlayer, *head.later_layers])
        self.head = head

    def fuse(self, features: Float[Tensor, "batch seq taps"]) -> Float[Tensor, "batch seq hidden"]:
        """See `Eagle3Head.fuse`."""
        return self.head.fuse(features)

    def fed_back(self, out: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """See `Eagle3Head.fed_back`."""
        return self._normed(out, self.head.norm) if self.shape.norm_output else out

    def __call__(
        self,
        g: Float[Tensor, "batch seq hidden"],
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq visible"],
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """The last layer's output; keys and values go where `cache` was told to put them."""
        out = self.finish(self.attend(g, tokens, positions, mask, cache))
        for index in range(1, len(self.layers)):
            out = self.plain(index, out, positions, mask, cache)
        return out

    def attend(self, g: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: PreallocatedCache) -> Tensor:
        """The first half of the first layer: the residual and what attention adds to it."""
        layer = self.head.midlayer
        normed = self._normed(g, layer.hidden_norm)
        x = torch.cat([self._normed(self.head.embed(tokens), layer.input_layernorm), normed], -1)
        return self.attention(0, x, normed if self.shape.norm_before_residual else g, positions, mask, cache)

    def logits(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of layer outputs."""
        return F.linear(self._normed(out, self.head.norm), self.head.lm_head.weight)
