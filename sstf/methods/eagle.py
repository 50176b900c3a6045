"""EAGLE-1 (arXiv 2401.15077): a head that predicts the target's next hidden state and drafts with its frozen lm_head.

With a dynamic tree at decoding it is EAGLE-2 (arXiv 2406.16858). Trained over several self-fed steps it is HASS (arXiv
2408.15766): at step i the head reads its own states, and attention sees them as it does in `ttt_attention`.

Loss: sum_i decay^i * (feature_weight * SmoothL1(f_hat, f), the mean over its numbers, + token_weight *
objective(target, draft)), over the positions whose supervised token was written by the assistant. The paper's
objective is the cross-entropy against the target's distribution, which is KL but for a constant. Where the teacher is
a hidden state it is the f to be hit; a teacher of top-k tokens has none, and f is the next row's, where there is one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.config_loading import Section
from sstf.errors import ConfigError
from sstf.features.dataset import rows_ahead
from sstf.features.spec import FeatureSpec
from sstf.heads import Eagle1Head, EagleShape, FusedEagle1
from sstf.losses import CHUNK, Kl, Objective, fused_distill
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits
from sstf.methods.cached_drafter import FeedbackDrafter
from sstf.methods.supervision import Supervision, in_blocks, outcome, rows_in_blocks, supervise, teachers_over
from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch, HiddenTeacher, StepOutput


class EagleConfig(Section):
    """`ttt_steps` 1 is EAGLE-1, more are HASS, weighted by `ttt_decay`. `draft_vocab_size` None proposes any token of
    the target's."""

    kind: Literal["eagle"] = "eagle"
    reads: ClassVar[tuple[str, ...]] = ()  # always the last layer
    num_layers: int = Field(default=1, ge=1, le=16)
    draft_vocab_size: int | None = Field(default=None, ge=16)
    ttt_steps: int = Field(default=1, ge=1, le=16)
    ttt_decay: float = Field(default=0.8, gt=0, le=1)
    objective: Objective = Kl()
    feature_weight: float = Field(default=1.0, ge=0)
    token_weight: float = Field(default=0.1, gt=0)


class EagleMethod:
    """A `TrainableMethod`."""

    def __init__(self, config: EagleConfig) -> None:
        self.config = config
        self.loss_rows = CHUNK

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self.config.draft_vocab_size or WHOLE_VOCABULARY

    @property
    def positions(self) -> int:
        """Self-fed steps, the first included."""
        return self.config.ttt_steps

    @property
    def unrolls(self) -> int:
        """Each step runs the layers."""
        return self.config.ttt_steps

    @property
    def limits(self) -> DraftLimits:
        """None: the head feeds itself."""
        return DraftLimits()

    @property
    def shared_layers(self) -> int:
        """None: the head has layers of its own."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The last layer, whose output the head norms itself."""
        return FeatureSpec((target.num_layers - 1,))

    def shape(self, target: TargetSpec, draft_vocab_size: int) -> EagleShape:
        """Of the head for a target."""
        return EagleShape(
            hidden_size=target.hidden_size,
            taps=target.hidden_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=target.intermediate_size,
            draft_vocab_size=draft_vocab_size,
            vocab_size=target.vocab_size,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            max_position_embeddings=target.max_position_embeddings,
            rope_scaling=target.rope_scaling,
            num_layers=self.config.num_layers,
        )

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> Eagle1Head:
        """A new head, which at first hands f on, next to little else.

        Raises:
            ConfigError: the target's final norm is none that the head can apply.
        """
        if not frozen.rms_norm:
            raise ConfigError(
                f"method.kind eagle: the final norm of target {target.name} ({target.architecture}) is no RMSNorm by "
                "its weight alone, so the head cannot make the states that lm_head reads; take method eagle3"
            )
        head = Eagle1Head(self.shape(target, len(draft_tokens)), frozen, draft_tokens)
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
            head.fc.weight[:, target.hidden_size :] = torch.eye(target.hidden_size)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Loss of one batch; see the module docstring."""
        assert isinstance(head, Eagle1Head)
        config, batch = self.config, in_blocks(batch)
        taught = supervise(batch, config.ttt_steps, head.t2d)
        valid = taught.valid
        rows = rows_in_blocks(valid.any(0))  # what no step learns from is not computed
        f = head.fuse(batch.features)
        predicted = head.unroll(f, batch.input_ids, batch.lengths, taught.ahead[:, rows])[valid[:, rows]]
        weights = (config.ttt_decay ** torch.arange(config.ttt_steps, device=f.device)).repeat_interleave(valid.sum(-1))
        result = fused_distill(
            head.scaled(predicted),
            head.target_head,
            teachers_over(head.draft_tokens, batch.teacher, taught.supervised[batch.loss_mask], frozen),
            taught.teacher_rows,
            config.token_weight * weights,
            config.objective,
            self.loss_rows,
            reverse=taught.reverse,
        )
        missed = config.feature_weight * _missed(predicted, f, batch, taught)
        both = dataclasses.replace(
            result,
            loss_sum=result.loss_sum + (weights * missed).sum(),
            losses=config.token_weight * result.losses + missed.detach(),
        )
        return outcome(batch, taught, both, head.draft_tokens)

    def drafter(self, head: nn.Module | None, device: torch.device) -> FeedbackDrafter:
        """A drafter with the fused form of the head."""
        assert isinstance(head, Eagle1Head)
        return FeedbackDrafter(FusedEagle1(head), head.draft_tokens)


def _missed(predicted: Tensor, f: Tensor, batch: FeatureBatch, taught: Supervision) -> Tensor:
    """SmoothL1 of each valid pair, [row]; 0 where the f that was to be hit is not known."""
    if isinstance(batch.teacher, HiddenTeacher):
        goal = batch.teacher.hidden[taught.supervised[batch.loss_mask]][taught.teacher_rows]
        return F.smooth_l1_loss(predicted.float(), goal.float(), reduction="none").mean(-1)
    ahead, there = (part[1:][taught.valid] for part in rows_ahead(batch.lengths, len(taught.valid) + 1, f.device))
    return F.smooth_l1_loss(predicted.float(), f[ahead].float(), reduction="none").mean(-1) * there
