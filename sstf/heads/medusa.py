"""Medusa heads (arXiv 2401.10774, section 2.1): the last hidden state, seen through a block for each token ahead.

    x          = final_norm(h_t)                    the target's own norm and state, both frozen
    out^(i)    = x + SiLU(W x), once or more        block i; W starts at zero, so that at first out = x
    logits^(i) = lm_head^(i)(out^(i))               of x_{t+2+i}: the target itself predicts x_{t+1}

`lm_head^(i)` is the target's own, frozen and shared, or one for each block that starts from it. Names are those that
vLLM loads (`blocks.<i>.layers.<j>`, `lm_heads.<i>`), so a state dict is the export.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MedusaShape:
    """Sizes: `heads` blocks of `layers` residual layers."""

    hidden_size: int
    heads: int
    layers: int
    bias: bool
    own_lm_heads: bool
    vocab_size: int
    rms_norm_eps: float


class MedusaBlock(nn.Module):
    """Residual layers, at first the identity."""

    def __init__(self, shape: MedusaShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=shape.bias) for _ in range(shape.layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Of the normed hidden state."""
        for layer in self.layers:
            added: Tensor = F.silu(layer(x))
            x = x + added
        return x


class MedusaHead(nn.Module):
    """All blocks. The target's final norm and, where it is shared, its lm_head are frozen and not in the state dict.

    `d2t` and `t2d` are as in `Eagle3Head`.
    """

    def __init__(self, shape: MedusaShape, final_norm: Tensor, lm_head: Tensor, draft_tokens: Tensor) -> None:
        """Args:
        shape: sizes.
        final_norm: [hidden], the target's.
        lm_head: [vocab, hidden], the target's.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        """
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(MedusaBlock(shape) for _ in range(shape.heads))
        of_draft = lm_head if len(draft_tokens) == len(lm_head) else lm_head[draft_tokens]
        if shape.own_lm_heads:
            vocab, hidden = of_draft.shape
            self.lm_heads = nn.ModuleList(nn.Linear(hidden, vocab, bias=False) for _ in range(shape.heads))
            with torch.no_grad():
                for own in self.lm_heads:
                    own.get_parameter("weight").copy_(of_draft)
        else:
            self.register_buffer("lm_head", of_draft, persistent=False)
        self.register_buffer("final_norm", final_norm, persistent=False)
        self.register_buffer("d2t", draft_tokens - torch.arange(len(draft_tokens), device=draft_tokens.device))
        t2d = torch.zeros(shape.vocab_size, dtype=torch.bool, device=draft_tokens.device)
        t2d[draft_tokens] = True
        self.register_buffer("t2d", t2d)
        self.lm_head: Tensor
        self.final_norm: Tensor
        self.d2t: Tensor
        self.t2d: Tensor

    @property
    def draft_tokens(self) -> Int[Tensor, "draft_vocab"]:
        """Target ids of the draft vocabulary."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def normed(self, features: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What the target's lm_head reads, of the last layer's outputs, in the dtype of the head."""
        dtype = next(self.blocks.parameters()).dtype
        wide = features.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return scaled.to(dtype) * self.final_norm.to(dtype)

    def output_weight(self, i: int) -> Float[Tensor, "draft_vocab hidden"]:
        """Of block i's lm_head."""
        return self.get_parameter(f"lm_heads.{i}.weight") if self.shape.own_lm_heads else self.lm_head

    def logits(self, i: int, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits of block i over the normed hidden state."""
        out = self.blocks[i](x)
        return F.linear(out, self.output_weight(i).to(out.dtype))
