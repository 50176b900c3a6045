"""The EAGLE-1 draft head (arXiv 2401.15077, section 3), which EAGLE-2 (2406.16858) and HASS (2408.15766) draft with.

    f_t         = final_norm(h_t)                           what the target's lm_head reads, h of its last layer
    f_hat_{t+1} = layers(fc([embed(x_{t+1}); f_t]))         2H -> H, then Llama layers
    draft logits = lm_head(f_hat_{t+1})                     the target's own, frozen

f_hat is fed back in place of f where the target has not been. The authors' features are transformers' last
`hidden_states`, and vLLM's `llama_eagle.py` is handed the target's output: both stand behind the final norm. Neither
norms what the first layer reads, nor what the last one returns.

Module names are those of EAGLE's published checkpoints and of vLLM, so a state dict is the export.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads.by_hand import rms
from sstf.heads.eagle import EagleModule, EagleShape, PlainLayer, positions_of
from sstf.heads.eagle_fused import FusedLayers
from sstf.heads.rollout import Attend, Rollout, attend, attend_reference
from sstf.targets import FrozenHead, PreallocatedCache


class Eagle1Head(EagleModule):
    """The head. Final norm and lm_head are the target's, shared, and not part of the state dict."""

    def __init__(self, shape: EagleShape, frozen: FrozenHead, draft_tokens: Tensor) -> None:
        """Args:
        shape: sizes; its flags have no meaning here.
        frozen: parts of the target.
        draft_tokens: [draft_vocab] int64, ascending target ids.
        """
        super().__init__(shape, frozen.embeddings, draft_tokens)
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList(PlainLayer(shape, input_norm=i > 0) for i in range(shape.num_layers))
        self.scale = frozen.scale
        whole = len(draft_tokens) == len(frozen.lm_head)
        self.register_buffer("final_norm", frozen.final_norm, persistent=False)
        self.register_buffer("target_head", frozen.lm_head if whole else frozen.lm_head[draft_tokens], persistent=False)
        self.final_norm: Tensor
        self.target_head: Tensor  # [draft_vocab, hidden]

    @property
    def plain_layers(self) -> list[PlainLayer]:
        """From the first to the last."""
        return [layer for layer in self.layers if isinstance(layer, PlainLayer)]

    def fuse(self, features: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """f of positions whose features the target computed, in the dtype of the head."""
        return rms(features.to(self.fc.weight.dtype), self.final_norm, self.shape.rms_norm_eps)

    def read(self, tokens: Int[Tensor, "*rows"], f: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What the first layer reads."""
        out: Tensor = self.fc(torch.cat([self.embed(tokens).to(f.dtype), f], -1))
        return out

    def unroll(
        self,
        f: Float[Tensor, "seq hidden"],
        tokens: Int[Tensor, "seq"],
        lengths: Sequence[int],
        reads: Int[Tensor, "steps row"],
    ) -> Float[Tensor, "steps row hidden"]:
        """f_hat of every step at the rows that are learned from, [steps, row, hidden]. Step i at row t reads token
        x_{t+1+i} at position t + i and the step before; arguments as in `Eagle3Head.unroll`."""
        return self._unrolled(attend, f, tokens, lengths, reads)

    def unroll_reference(self, f: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> Tensor:
        """`unroll` with attention by its definition; memory grows with the square of `seq`."""
        return self._unrolled(attend_reference, f, tokens, lengths, reads)

    def _unrolled(self, how: Attend, f: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> Tensor:
        rows, position = reads[0], positions_of(lengths, f.device)
        rollout = Rollout(self.plain_layers, rows, lengths, how)
        x = self.read(tokens, f)
        outs = [rollout.start(x, x, *self.rope(position))]  # the embeddings are in x
        for step, read in enumerate(reads[1:], start=1):
            x = self.read(tokens[read], outs[-1])
            outs.append(rollout.step(x, x, *self.rope(position[rows] + step)))
        return torch.stack(outs)

    def scaled(self, f_hat: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """What `target_head` makes draft logits of. Targets that cap their logits are drafted for without the cap,
        as engines do: it keeps the order of tokens."""
        return f_hat if self.scale == 1 else f_hat * self.scale

    def logits(self, f_hat: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Draft logits."""
        return F.linear(self.scaled(f_hat), self.target_head.to(f_hat.dtype))


class FusedEagle1(FusedLayers):
    """The head in the form that drafts; see `FusedEagle`."""

    def __init__(self, head: Eagle1Head) -> None:
        super().__init__(head, head.plain_layers)
        self.fuse, self.read, self.logits = head.fuse, head.read, head.logits

    def fed_back(self, out: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """f_hat itself."""
        return out

    def __call__(
        self,
        g: Float[Tensor, "batch seq hidden"],
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq visible"],
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """f_hat of the next position, of the f that is `g` here."""
        x = self.read(tokens, g)
        for index in range(len(self.layers)):
            x = self.plain(index, x, positions, mask, cache)
        return x
