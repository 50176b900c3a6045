"""The P-EAGLE draft head (arXiv 2602.01469): EAGLE-3's, which drafts all positions in one pass.

Where EAGLE-3 feeds its output back, depth d > 0 reads what is the same everywhere: the embedding of a mask token, and
fc of the learned `mask_hidden`. Only its place differs: it stands at position t + d behind the row t that it drafts
from, and sees the rows 0..t of the text and the depths 1..d of its own.

Names are those that vLLM reads (`mask_hidden` beside an EAGLE-3 checkpoint, and the mask token's id in its config).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sstf.heads.eagle import Eagle3Head, EagleShape, positions_of
from sstf.heads.rollout import Attend, attend, in_one_pass


class PEagleHead(Eagle3Head):
    """The head; `mask_token` is the target id whose embedding drafted positions read."""

    def __init__(self, shape: EagleShape, embeddings: Tensor, draft_tokens: Tensor, mask_token: int) -> None:
        """See `EagleModule`."""
        super().__init__(shape, embeddings, draft_tokens)
        self.mask_token = mask_token
        self.mask_hidden = nn.Parameter(torch.empty(shape.taps))

    def draft(
        self,
        features: Float[Tensor, "seq taps"],
        tokens: Int[Tensor, "seq"],
        lengths: Sequence[int],
        depths: Sequence[Int[Tensor, "row"]],
        how: Attend = attend,
    ) -> Float[Tensor, "pair hidden"]:
        """All depths over packed documents.

        Args:
            features: of the target.
            tokens: x_{t+1}.
            lengths: rows of each document, see `FeatureBatch`.
            depths: of each depth, the rows that are drafted from, ascending; from depth 1 on among those of the depth
                before. Depth 0 is run at all rows, but only handed out at these.
            how: `attend`, or its reference.

        Returns:
            The output before the final norm at the rows of depth 0, then at those of depth 1, and so on.
        """
        position = positions_of(lengths, tokens.device)
        g = self.fuse(features)
        masks = sum(len(rows) for rows in depths[1:])
        mask_token = torch.full((masks,), self.mask_token, device=tokens.device)
        embeds = self.embed(torch.cat([tokens, mask_token])).to(g.dtype)
        x = torch.cat([g, self.fuse(self.mask_hidden).to(g.dtype).expand(masks, -1)])
        at = torch.cat([position, *(position[rows] + depth for depth, rows in enumerate(depths) if depth)])
        return in_one_pass([self.midlayer, *self.later_layers], embeds, x, self.rope(at), depths, lengths, how)
