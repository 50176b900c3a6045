"""DSpark (arXiv 2607.05147): DFlash's block with a Markov bias, and a confidence that says how much to verify.

All slots predict, the anchor's too: slot k, at the position of its own token, predicts the next one, so a block of B
drafts B tokens (as vLLM 0.32 runs it where `sample_from_anchor` is true, its default for these checkpoints). The logits
of a draft get a bias of low rank by the token before it. A second head tells from the slot and the token before how
likely the draft is to be accepted.

Loss: weight * objective + confidence_weight * weight * BCE(confidence, overlap), the overlap being the chance that a
token drawn from the draft is accepted, 1 - ||draft_probs - target_probs||_1 / 2. The paper's objective is `mixed`: 0.1
cross entropy + 0.9 of that distance. The confidence's target has no gradient.

At decoding a chain is verified as far as the product of its confidences stays at `verify_above`, and, where the cost of
passes is known, while one more draft raises the expected tokens a second; it ends at the first draft that does not.
Whether draft i is verified depends on confidences 0 .. i, that is on drafts 0 .. i - 1 and never on its own token, so
the text keeps its distribution (`decode/verify.py`). Trees are verified whole.

The paper calibrates confidences by a temperature for each draft, fitted from left to right on held-out text. Here they
are calibrated by what passes before accepted (`trees/calibration.py`), which follows the text, the temperature and the
rule of verification: a greedy draft that is the target's best token is always accepted, however small the overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads import DSparkHead
from sstf.losses import Mixed, Objective
from sstf.methods.base import News
from sstf.methods.block import (
    BlockConfig,
    BlockDrafter,
    BlockMethod,
    Judged,
    block_shape,
    initialise,
    mask_token_of,
)
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import AnyTree, Chain, DraftContext, prune
from sstf.trees.calibration import PathCalibration
from sstf.trees.growth import StepCost
from sstf.types import DraftTree, FeatureBatch, StepOutput


class DSparkConfig(BlockConfig):
    """See `BlockConfig`. `rank` is that of the Markov bias, `confidence_weight` what the confidence has in the loss.

    `verify_above` is the least chance to be emitted, by the calibrated confidences, with which a draft of a chain is
    verified; 0 verifies all.
    """

    kind: Literal["dspark"] = "dspark"
    block_size: int = Field(default=7, ge=1, le=64)
    objective: Objective = Mixed()
    rank: int = Field(default=256, ge=1)
    confidence_weight: float = Field(default=1.0, ge=0)
    verify_above: float = Field(default=0.05, ge=0, lt=1)


class DSparkMethod(BlockMethod):
    """A `TrainableMethod`."""

    first_slot = 0

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.config = config

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> DSparkHead:
        """A new head, random but for its final norm; bias and confidence are nothing yet."""
        config = self.config
        head = DSparkHead(
            block_shape(config, target, first_slot=self.first_slot), frozen.embeddings, frozen.lm_head, draft_tokens,
            mask_token_of(config, frozen.embeddings), config.rank,
        )  # fmt: skip
        initialise(head, frozen)
        nn.init.zeros_(head.confidence_head.proj.bias)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """See the module docstring. The losses that are reported are those of the objective."""
        assert isinstance(head, DSparkHead)
        config = self.config
        drafts = Judged(head, batch, frozen, config.anchors, self.loss_rows)
        states = head.paths(drafts.tokens)
        low_rank = drafts.of_valid(head.low_rank(drafts.hidden, states))
        weights = drafts.weights(config.weights, low_rank)
        found = drafts.distill(config.objective, weights, low_rank)
        confidence = drafts.of_valid(head.confidence(drafts.hidden, states))
        overlap = found.overlap.to(confidence.dtype).clamp(0, 1)
        wrong = F.binary_cross_entropy_with_logits(confidence, overlap, weights, reduction="sum")
        return drafts.output(found.loss_sum + config.confidence_weight * wrong, found)

    def drafter(self, head: nn.Module | None, device: torch.device) -> DSparkDrafter:
        """See `DSparkDrafter`."""
        assert isinstance(head, DSparkHead)
        return DSparkDrafter(head, self.config.verify_above)


def verified(chances: Sequence[float], least: float, cost: StepCost | None) -> int:
    """How many drafts of a chain are verified, decided from left to right.

    Args:
        chances: of each draft, that it and all before it are accepted; falling.
        least: with which a draft is verified.
        cost: of passes, where it is known.

    >>> verified([0.9, 0.5, 0.1, 0.01], 0.1, None)
    3
    """
    for i, chance in enumerate(chances):
        if chance < least or (cost is not None and cost.best_size(chances[: i + 1], 1) <= i):
            return i
    return len(chances)


class DSparkDrafter(BlockDrafter):
    """Verifies chains as far as it is confident, and learns what its confidences are worth from what was accepted."""

    def __init__(self, head: DSparkHead, least: float) -> None:
        super().__init__(head)
        self.dspark, self.least = head, least
        self.experience = PathCalibration()
        self._chains: dict[int, tuple[list[int], list[float]]] = {}  # by slot: drafts not yet heard of, confidences

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        super().restart(slot)
        self._chains.pop(slot, None)

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        for one in news:
            self._hear(one)
        return super().propose(news, policy, context)

    def _hear(self, news: News) -> None:
        """Of the drafts of the last chain that were reached, which one was emitted."""
        drafts, confidences = self._chains.pop(news.slot, ([], []))
        accepted = 0
        for draft, emitted in zip(drafts, news.tokens, strict=False):
            if draft != emitted:
                break
            accepted += 1
        reached = min(accepted + 1, len(drafts))
        outcomes = [float(i < accepted) for i in range(reached)]
        self.experience.observe(range(1, reached + 1), [0] * reached, confidences[:reached], outcomes)

    def finish(
        self, trees: list[DraftTree], hidden: Tensor, news: Sequence[News], policy: AnyTree, context: DraftContext
    ) -> list[DraftTree]:
        """See `BlockDrafter.finish`."""
        if not isinstance(policy, Chain):
            return trees
        found = []
        for one, tree, states in zip(news, trees, hidden, strict=True):
            size = len(tree)
            before = torch.cat([tree.tokens.new_tensor(one.tokens[-1:]), tree.tokens])[:size]
            confidence = self.dspark.confidence(states[:size], self.dspark.path_start(before)).sigmoid().float().cpu()
            own = [self.experience.probabilities(c.view(1, 1), depth) for depth, c in enumerate(confidence, 1)]
            chances = torch.cat([confidence.new_empty(1, 0), *own], 1)[0].cumprod(0)
            keep = verified(chances.tolist(), self.least, context.cost)
            self._chains[one.slot] = (tree.tokens[:keep].tolist(), confidence[:keep].tolist())
            found.append(tree if keep == size else prune(tree, [i < keep for i in range(size)]))
        return found
