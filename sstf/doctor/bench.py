"""A head bound to a target, the probe, and how the checks run one on the other.

All figures of agreement come from the method's own loss, the code that trains. They are compared with themselves under
another alignment on the same rows, so that the text's difficulty falls out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sstf.decode.layered import LayeredPasses
from sstf.doctor.probe import Probe
from sstf.features import to_device
from sstf.losses import accepted_drafts
from sstf.methods import build_method
from sstf.methods.base import News, TrainableMethod
from sstf.methods.checkpoint import StoredHead, bind
from sstf.targets import FrozenHead, SplitDecoder, Target
from sstf.trees import Chain, DraftContext
from sstf.types import FeatureBatch, StepOutput

DRAFTED = 2  # tokens of the chain that the decoder's form of the head drafts


@dataclass(frozen=True)
class Agreement:
    """`acceptance` is the chance that a drafted token is accepted, `loss` the mean of the method's loss a token."""

    acceptance: float
    loss: float


@dataclass(frozen=True)
class Bench:
    """`training` is the head in float32, as the loss runs it; `decoding` in the target's dtype, as drafting does."""

    target: Target
    stored: StoredHead
    method: TrainableMethod
    training: nn.Module
    decoding: nn.Module
    probe: Probe

    @property
    def frozen(self) -> FrozenHead:
        """Of the target."""
        return self.target.frozen_head

    @property
    def draft_tokens(self) -> Tensor:
        """[draft_vocab] int64 target ids that the head can propose."""
        offsets = self.stored.tensors["d2t"]
        return offsets + torch.arange(len(offsets))

    @torch.no_grad()
    def run(self, batch: FeatureBatch) -> StepOutput:
        """The method's loss on a batch."""
        return self.method.loss(self.training, to_device(batch, self.target.device), self.frozen)

    def agreement(self, shift: int = 0, features: Tensor | None = None) -> Agreement:
        """Of the first drafted token with the target, over all rows of the answers; see `Probe.supervised`."""
        rows = self.probe.answer
        found = self.run(self.probe.supervised(rows, shift, features))
        return Agreement(
            float(found.overlap[0]) / int(rows.sum()), float(found.losses[0] / found.valid[0].clamp_min(1))
        )

    def accepted_length(self) -> float:
        """1 + the mean of the leading hits of a greedy chain at each row whose chain lies in the answers."""
        chains = accepted_drafts(self.run(self.probe.supervised(self.probe.answer)).chain_hits)
        return 1 + float(chains.float().mean()) if len(chains) else 1.0

    @property
    def drafting_place(self) -> int | None:
        """How many tokens of the first text are known where decoding drafts, a few into the answer or later: a method
        may draft nothing where it is in doubt. None where it is everywhere."""
        text = self.probe.texts[0]
        places = range(min(text.start + 4, len(text.ids) - 2), len(text.ids) - 1)
        return next((known for known in places if self.drafted(known)[0]), None)

    @torch.no_grad()
    def drafted(self, known: int) -> tuple[list[int], list[float]]:
        """Tokens, and their draft probabilities, that decoding drafts behind so many tokens of the first text."""
        text, features = self.probe.texts[0], self.probe.batch.features
        news = News(0, text.ids[1 : known + 1], features[:known].to(self.target.device))
        drafter = self.method.drafter(self.decoding, self.target.device)
        capacity = len(text.ids) + 2 * DRAFTED + 1
        shared = self.method.shared_layers
        split = SplitDecoder(self.target, shared) if shared else None
        passes = LayeredPasses(self.target, split, None, 1, capacity) if split else None
        if passes:
            passes.prefill(0, text.ids[:known])
        drafter.start(1, capacity, passes)
        (tree,) = drafter.propose([news], Chain(depth=DRAFTED), DraftContext(depth=DRAFTED))
        return tree.tokens.tolist(), [] if tree.confidence is None else tree.confidence.tolist()


def open_bench(target: Target, stored: StoredHead, probe: Probe) -> Bench:
    """Bind a stored head.

    Raises:
        HeadError: its tensors do not fit.
    """
    method = build_method(stored.config)
    assert isinstance(method, TrainableMethod)
    training = bind(stored, target.frozen_head).to(target.device).eval().requires_grad_(False)
    decoding = bind(stored, target.frozen_head).to(target.device, target.dtype).eval().requires_grad_(False)
    return Bench(target, stored, method, training, decoding, probe)
