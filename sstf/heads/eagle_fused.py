"""The EAGLE-3 head in the form that drafts: the same arithmetic as `eagle.py` in fewer and larger operations.

Query, key and value are one matrix product, gate and up another; rotary tables are made once; grouped heads go to
the attention kernel as they are. A draft pass is short, so every operation saved counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sstf.heads.eagle import Eagle3Head, rotate
from sstf.targets import PreallocatedCache


class FusedEagle:
    """Inference over a head's weights as they are now; a head that is trained further needs a new one."""

    def __init__(self, head: Eagle3Head) -> None:
        layer, attention, mlp = head.midlayer, head.midlayer.self_attn, head.midlayer.mlp
        self.head = head
        self.qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        self.norms = tuple(
            norm.weight.detach()
            for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, head.norm)
            if norm.weight is not None
        )
        self.cos = self.sin = torch.empty(0)

    def make_rope(self, capacity: int) -> None:
        """Rotary tables for positions below `capacity`."""
        positions = torch.arange(capacity, device=self.qkv.device)
        self.cos, self.sin = self.head.rope(positions)

    def fuse(self, features: Float[Tensor, "batch seq taps"]) -> Float[Tensor, "batch seq hidden"]:
        """See `Eagle3Head.fuse`."""
        return self.head.fuse(features)

    def fed_back(self, out: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """See `Eagle3Head.fed_back`."""
        return self._norm(out, self.norms[3]) if self.head.shape.norm_output else out

    def __call__(
        self,
        g: Float[Tensor, "batch seq hidden"],
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq visible"],
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """The layer's output; keys and values go where `cache` was told to put them."""
        return self.finish(self.attend(g, tokens, positions, mask, cache))

    def attend(self, g: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: PreallocatedCache) -> Tensor:
        """The first half: the residual and what attention adds to it, which is what the MLP reads and adds to."""
        head, shape = self.head, self.head.shape
        in_norm, hidden_norm, *_ = self.norms
        query_key = shape.num_heads + shape.num_kv_heads
        normed = self._norm(g, hidden_norm)
        x = torch.cat([self._norm(head.embed(tokens), in_norm), normed], -1)
        qkv = torch.unflatten(F.linear(x, self.qkv), -1, (-1, shape.head_dim))  # [batch, seq, all heads, dim]
        turned = rotate(qkv[:, :, :query_key], self.cos[positions], self.sin[positions]).transpose(1, 2)
        keys, values = cache.update(turned[:, shape.num_heads :], qkv[:, :, query_key:].transpose(1, 2), 0)
        attended = F.scaled_dot_product_attention(
            turned[:, : shape.num_heads], keys, values, attn_mask=mask[:, None], enable_gqa=True
        )
        residual = normed if shape.norm_before_residual else g
        return residual + F.linear(attended.transpose(1, 2).flatten(2), head.midlayer.self_attn.o_proj.weight)

    def finish(self, r: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """The second half: the MLP and its residual."""
        gate, up = F.linear(self._norm(r, self.norms[2]), self.gate_up).chunk(2, -1)
        return r + F.linear(F.silu(gate) * up, self.head.midlayer.mlp.down_proj.weight)

    def logits(self, out: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of layer outputs."""
        return F.linear(self._norm(out, self.norms[3]), self.head.lm_head.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.head.shape.rms_norm_eps)
