"""What a draft head is trained to make small, one value a token, with the slopes that its gradient needs.

Notation, with the papers' symbols in brackets: `target_probs` (p) is the target's distribution over its WHOLE
vocabulary, cut to the draft vocabulary, so a row sums to the coverage, not to one; `draft_probs` (q) sums to one.
t is p renormalised over the draft vocabulary, y its argmax, and s = sign(p - q).

| quantity | value of a row | gradient with respect to the draft logits |
|---|---|---|
| KL divergence | sum_v t_v log(t_v / q_v) | q - t |
| cross entropy | -log q_y | q - onehot(y) |
| reverse KL divergence, R | sum_v q_v log(q_v / t_v) | q * (log(q / t) - R) |
| overlap (alpha): the chance that a token is accepted | sum_v min(p_v, q_v) | q / 2 * (s - sum_v q_v s_v) |

The last row: min(p, q) moves with q only where q < p, so d alpha / d z_j = q_j (1[q_j < p_j] - m) with m the draft's
mass where q < p, and 1[q < p] = (1 + s) / 2. Where p = q, s = 0 takes the middle of the two one-sided slopes, as
autograd does for a minimum. Every gradient sums to zero over the vocabulary, as that of a function of a softmax must.

Of the reverse KL: d q_v / d z_j = q_v (1[v = j] - q_j), and the derivative of q log(q / t) by q is log(q / t) + 1,
whose constant drops out as sum_v d q_v = 0. Where t is tiny or zero (a token that a teacher of the top k does not list,
or whose exponential underflowed) log(q / t) has no bound, so t is taken as `FLOOR` at least. That is the divergence
from a teacher whose tail is so high: at most -log FLOOR = 18.4 nats, and at least -log(1 + FLOOR * draft_vocab), about
zero. It is no objective of its own but an addition to one, with a weight for each row: what `methods` do with drafts
that were rejected (`FeatureBatch.rejected`).

An objective is a function of one divergence (KL or cross entropy) and of alpha; `slopes` are its derivatives with
respect to these two, and the chain rule does the rest. Arithmetic of full rows is not here: see `eager` and `fused`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sstf.config_loading import Section

FLOOR = 1e-8  # least probability of the teacher in a reverse KL


class _Loss(Section):
    """A function of a row's divergence and overlap; here, the divergence itself."""

    kind: str
    hard: ClassVar[bool] = False  # against the target's argmax instead of its distribution

    def losses(self, divergence: Tensor, overlap: Tensor) -> Tensor:
        """[row], from the row's divergence and overlap."""
        return divergence

    def slopes(self, overlap: Tensor) -> tuple[Tensor, Tensor] | None:
        """([row], [row]): d losses / d divergence and d losses / d overlap; None where they are 1 and 0."""
        return None


class Kl(_Loss):
    """KL(target || draft) over the draft vocabulary, as in EAGLE-3 (arXiv 2503.01840)."""

    kind: Literal["kl"] = "kl"


class CrossEntropy(_Loss):
    """-log draft_probs of the target's most likely token: the hard label."""

    kind: Literal["ce"] = "ce"
    hard: ClassVar[bool] = True


class TotalVariation(_Loss):
    """1 - alpha. Its gradient vanishes where the draft gives the target's tokens no mass yet: not for a fresh head."""

    kind: Literal["tv"] = "tv"

    def losses(self, divergence: Tensor, overlap: Tensor) -> Tensor:
        """See `_Loss.losses`."""
        return 1 - overlap

    def slopes(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Loss.slopes`."""
        return torch.zeros_like(overlap), -torch.ones_like(overlap)


class LkAlpha(_Loss):
    """-log alpha (arXiv 2602.23881): total variation with a slope of 1 / alpha, so that it starts from anywhere."""

    kind: Literal["lk_alpha"] = "lk_alpha"

    def losses(self, divergence: Tensor, overlap: Tensor) -> Tensor:
        """See `_Loss.losses`. Infinite where nothing overlaps."""
        return -overlap.log()

    def slopes(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Loss.slopes`."""
        return torch.zeros_like(overlap), -1 / overlap


class LkHybrid(_Loss):
    """lambda * KL + (1 - lambda) * (1 - alpha), lambda = exp(-eta * alpha) (arXiv 2602.23881).

    KL leads while the token would be refused, total variation where it is mostly accepted. Lambda is taken token by
    token and has no gradient; the authors' own trainer takes it from the mean alpha of the batch, which a loss in
    one pass cannot know.
    """

    kind: Literal["lk_hybrid"] = "lk_hybrid"
    eta: float = Field(default=3.0, ge=0)

    def losses(self, divergence: Tensor, overlap: Tensor) -> Tensor:
        """See `_Loss.losses`."""
        share = torch.exp(-self.eta * overlap.detach())
        return share * divergence + (1 - share) * (1 - overlap)

    def slopes(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Loss.slopes`."""
        share = torch.exp(-self.eta * overlap)
        return share, share - 1


class Mixed(_Loss):
    """ce * cross entropy + l1 * ||draft_probs - target_probs||_1 (DSpark, arXiv 2607.05147).

    Over the whole vocabulary the distance is 2 (1 - alpha), whatever the draft vocabulary leaves out.
    """

    kind: Literal["mixed"] = "mixed"
    hard: ClassVar[bool] = True
    ce: float = Field(default=0.1, ge=0)
    l1: float = Field(default=0.9, ge=0)

    def losses(self, divergence: Tensor, overlap: Tensor) -> Tensor:
        """See `_Loss.losses`."""
        return self.ce * divergence + 2 * self.l1 * (1 - overlap)

    def slopes(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Loss.slopes`."""
        return torch.full_like(overlap, self.ce), torch.full_like(overlap, -2 * self.l1)


Objective = Annotated[Kl | CrossEntropy | TotalVariation | LkAlpha | LkHybrid | Mixed, Field(discriminator="kind")]
