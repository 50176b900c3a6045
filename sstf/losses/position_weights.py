"""How much each draft position of a block counts in its loss; torch alone.

A chain is accepted up to its first miss, so early positions matter more. Position i is counted from 0.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sstf.config_loading import Section


class Exponential(Section):
    """exp(-i / gamma) (DFlash, arXiv 2602.06036: gamma 7 for blocks of 16, 4 for blocks of 7 or 8).

    DSpark's exp(-k / gamma) with k from 1 is this times a constant.
    """

    kind: Literal["exponential"] = "exponential"
    adaptive: ClassVar[bool] = False  # whether they depend on what the draft says now
    gamma: float = Field(default=4.0, gt=0)

    def weights(
        self, chances: Float[Tensor, "position row"], valid: Bool[Tensor, "position row"]
    ) -> Float[Tensor, "position row"]:
        """See `DPace.weights`; the same in every row."""
        falling = torch.exp(torch.arange(len(valid), device=valid.device) / -self.gamma)
        return falling[:, None].expand(valid.shape)


class DPace(Section):
    """D-PACE (arXiv 2605.18810): as much as the expected accepted length depends on a position.

    s_i = (1 - floor) * chance_i + floor, C_i = s_0 * .. * s_i, and w_i = the sum of C_i, C_{i+1}, .. The floor keeps
    late positions alive while early ones are still wrong.
    """

    kind: Literal["d_pace"] = "d_pace"
    adaptive: ClassVar[bool] = True
    floor: float = Field(default=0.5, ge=0, le=1)

    def weights(
        self, chances: Float[Tensor, "position row"], valid: Bool[Tensor, "position row"]
    ) -> Float[Tensor, "position row"]:
        """Weights, without a graph.

        Args:
            chances: what the draft gives the target's most likely token now.
            valid: positions that are supervised; the others neither break a chain nor count.

        >>> ones = torch.ones(3, 1)
        >>> DPace(floor=0.5).weights(ones * 0.0, ones.bool()).flatten().tolist()
        [0.875, 0.375, 0.125]
        """
        steps = torch.where(valid, (1 - self.floor) * chances.detach() + self.floor, 1.0)
        reached = steps.cumprod(0) * valid
        return reached.flip(0).cumsum(0).flip(0)


PositionWeights = Annotated[Exponential | DPace, Field(discriminator="kind")]
