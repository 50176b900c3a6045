"""Medusa (arXiv 2401.10774): a small head for each token ahead, all reading the target's last hidden state.

Loss: sum_i decay^i * objective(target over the draft vocabulary, head i), where head i at row t is taught by the
teacher of row t + i. The paper's is cross entropy with decay 0.8. Heads do not see what the others drafted, so all
nodes of a level share one distribution; trees make up for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.errors import TargetError
from sstf.features.spec import FeatureSpec
from sstf.heads import MedusaHead, MedusaShape
from sstf.losses import CHUNK, CrossEntropy, Distilled, Objective, fused_distill
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits, News, ShallowPasses
from sstf.methods.supervision import outcome, rows_in_blocks, supervise, teachers_over
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import AnyTree, DraftContext, grow
from sstf.types import DraftTree, FeatureBatch, StepOutput


class MedusaConfig(Section):
    """`heads` is how many tokens are drafted at most, `layers` the residual layers of each head, with a `bias` or
    without.

    `lm_head` `shared` reads every head through the target's frozen lm_head; `own` trains one for each, as published:
    heads * draft_vocab_size * hidden parameters. `draft_vocab_size` None is the target's whole vocabulary. The loss of
    each head counts `decay` times that of the one before. `objective` is what each is trained for.
    """

    kind: Literal["medusa"] = "medusa"
    reads: ClassVar[tuple[str, ...]] = ()  # always the last layer
    heads: int = Field(default=5, ge=1, le=16)
    layers: int = Field(default=1, ge=1, le=8)
    bias: bool = True
    lm_head: Literal["shared", "own"] = "shared"
    draft_vocab_size: int | None = Field(default=None, ge=16)
    decay: float = Field(default=0.8, gt=0, le=1)
    objective: Objective = CrossEntropy()


class MedusaMethod:
    """A `TrainableMethod`."""

    def __init__(self, config: MedusaConfig) -> None:
        self.config = config
        self.loss_rows = CHUNK

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self.config.draft_vocab_size or WHOLE_VOCABULARY

    @property
    def positions(self) -> int:
        """One a head."""
        return self.config.heads

    @property
    def unrolls(self) -> int:
        """Each head runs once."""
        return self.config.heads

    @property
    def limits(self) -> DraftLimits:
        """A level a head."""
        return DraftLimits(depth=self.config.heads)

    @property
    def shared_layers(self) -> int:
        """None: the heads have blocks of their own."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The last layer, whose output the final norm and lm_head read."""
        return FeatureSpec((target.num_layers - 1,))

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> MedusaHead:
        """A new head, whose every output is the target's own next-token distribution.

        Raises:
            TargetError: the target's final norm is of another kind than the head's.
        """
        if not frozen.rms_norm:
            raise TargetError(
                f"target {target.name}: its final norm is no plain RMSNorm, which Medusa heads read the last layer "
                "through; choose another method for this target"
            )
        shape = MedusaShape(
            hidden_size=target.hidden_size,
            heads=self.config.heads,
            layers=self.config.layers,
            bias=self.config.bias,
            own_lm_heads=self.config.lm_head == "own",
            vocab_size=target.vocab_size,
            rms_norm_eps=target.rms_norm_eps,
        )
        return MedusaHead(shape, frozen.final_norm, frozen.lm_head, draft_tokens)

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """See the module docstring."""
        assert isinstance(head, MedusaHead)
        heads = self.config.heads
        taught = supervise(batch, heads, head.t2d)
        valid = taught.valid
        rows = rows_in_blocks(valid.any(0))
        x = head.normed(batch.features[rows])
        outs = torch.stack([block(x) for block in head.blocks])  # [heads, row, hidden]
        teachers = teachers_over(head.draft_tokens, batch.teacher, taught.supervised[batch.loss_mask], frozen)
        reverse = taught.reverse
        weights = (self.config.decay ** torch.arange(heads, device=valid.device)).repeat_interleave(valid.sum(-1))

        def distilled(some: slice) -> Distilled:
            """Of consecutive heads that share an lm_head."""
            before, here = int(valid[: some.start].sum()), int(valid[some].sum())
            return fused_distill(
                outs[some][valid[some][:, rows]],
                head.output_weight(some.start),
                teachers,
                taught.teacher_rows[before : before + here],
                weights[before : before + here],
                self.config.objective,
                self.loss_rows,
                reverse=None if reverse is None else reverse[before : before + here],
            )

        if head.shape.own_lm_heads:
            result = _joined([distilled(slice(i, i + 1)) for i in range(heads)])
        else:
            result = distilled(slice(0, heads))
        return outcome(batch, taught, result, head.draft_tokens)

    def drafter(self, head: nn.Module | None, device: torch.device) -> MedusaDrafter:
        """A drafter, which keeps nothing from step to step."""
        assert isinstance(head, MedusaHead)
        return MedusaDrafter(head)


def _joined(parts: Sequence[Distilled]) -> Distilled:
    return Distilled(
        torch.stack([part.loss_sum for part in parts]).sum(),
        torch.cat([part.losses for part in parts]),
        torch.cat([part.draft_token for part in parts]),
        torch.cat([part.overlap for part in parts]),
    )


class MedusaDrafter:
    """Reads the state behind the last emitted token alone. A level costs one head, so only those that a tree comes to
    are run."""

    def __init__(self, head: MedusaHead) -> None:
        self.head = head
        self.draft_tokens = head.draft_tokens
        self.levels = 0

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`."""

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        x = self.head.normed(torch.stack([one.features[-1] for one in news]))  # [batch, hidden]
        self.levels = 1

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            logits = self.head.logits(self.levels, x)
            self.levels += 1
            return logits[:, None].expand(-1, parents.shape[1], -1)

        context = replace(context, depth=min(context.depth, self.head.shape.heads))
        return grow(policy, context, self.head.logits(0, x), expand, self.draft_tokens)
