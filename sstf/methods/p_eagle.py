"""P-EAGLE (arXiv 2602.01469): EAGLE-3's head, which drafts all depths in one pass.

Loss: sum_d decay^d * objective(target over the draft vocabulary, draft at depth d), over the positions whose supervised
token was written by the assistant and whose teacher's argmax the draft vocabulary holds. Long rollouts at every
position would cost depth times the rows: of a document's rows that can be drafted from, depth d is run and trained at
max(retain^d, floor), drawn anew in every step, and only where the depths in front of it are (conditional drop, the
paper's section on COD). Deep positions so weigh less by themselves. Validation takes all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.errors import ConfigError
from sstf.features.spec import FeatureSpec
from sstf.heads import EagleShape, FusedEagle, PEagleHead
from sstf.losses import CHUNK, Kl, Objective, fused_distill
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits, News
from sstf.methods.cached_drafter import CachedDrafter
from sstf.methods.eagle3_parts import fused_layers, initialise
from sstf.methods.supervision import in_blocks, outcome, supervise, teachers_over
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import AnyTree, DraftContext, grow
from sstf.types import DraftTree, FeatureBatch, StepOutput


class PEagleConfig(Section):
    """`layers` and `init` are as in EAGLE-3. `depth` is how many tokens are trained, and drafted at most.

    `mask_token_id` is the target id whose embedding stands for tokens not known yet; None takes the last one. The
    embeddings are the target's and frozen, so it may be any: what a drafted position reads is learned beside it.
    `draft_vocab_size` None proposes any token of the target's.
    """

    kind: Literal["p_eagle"] = "p_eagle"
    reads: ClassVar[tuple[str, ...]] = ("layers",)
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    num_layers: int = Field(default=2, ge=1, le=16)
    depth: int = Field(default=7, ge=1, le=16)
    draft_vocab_size: int | None = Field(default=8192, ge=16)
    mask_token_id: int | None = Field(default=None, ge=0)
    cod_retain: float = Field(default=0.8, gt=0, le=1)
    cod_floor: float = Field(default=0.2, ge=0, le=1)
    decay: float = Field(default=1.0, gt=0, le=1)
    init: Literal["target", "random"] = "target"
    objective: Objective = Kl()


class PEagleMethod:
    """A `TrainableMethod`."""

    def __init__(self, config: PEagleConfig) -> None:
        self.config = config
        self.loss_rows = CHUNK

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self.config.draft_vocab_size or WHOLE_VOCABULARY

    @property
    def positions(self) -> int:
        """Depths."""
        return self.config.depth

    @property
    def shares(self) -> list[float]:
        """Of the rows that can be drafted from, those that each depth is trained at."""
        config = self.config
        return [max(config.cod_retain**depth, config.cod_floor) for depth in range(config.depth)]

    @property
    def unrolls(self) -> int:
        """One pass, over so many times the rows."""
        return math.ceil(sum(self.shares))

    @property
    def limits(self) -> DraftLimits:
        """As deep as it was trained; children of one level share its distribution."""
        return DraftLimits(depth=self.config.depth)

    @property
    def shared_layers(self) -> int:
        """None: the head has layers of its own."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The configured layers, or low / middle / high.

        Raises:
            ConfigError: the target lacks a layer, or the mask token.
        """
        mask_token = self.config.mask_token_id
        if mask_token is not None and mask_token >= target.vocab_size:
            raise ConfigError(
                f"method.mask_token_id is {mask_token}; target {target.name} has the tokens 0 to "
                f"{target.vocab_size - 1}"
            )
        return fused_layers(self.config.layers, target)

    def mask_token(self, target: TargetSpec) -> int:
        """See `PEagleConfig`."""
        return target.vocab_size - 1 if self.config.mask_token_id is None else self.config.mask_token_id

    def shape(self, target: TargetSpec, draft_vocab_size: int) -> EagleShape:
        """Of the head for a target."""
        return EagleShape(
            hidden_size=target.hidden_size,
            taps=target.hidden_size * len(self.feature_spec(target).layers),
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

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> PEagleHead:
        """A new head; lm_head rows come from the target's."""
        shape = self.shape(target, len(draft_tokens))
        head = PEagleHead(shape, frozen.embeddings, draft_tokens, self.mask_token(target))
        nn.init.normal_(head.mask_hidden, std=0.02)
        initialise(head, frozen, self.config.init)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Loss of one batch; see the module docstring. A head in evaluation mode is tried at every depth and row."""
        assert isinstance(head, PEagleHead)
        config, seeds = self.config, batch.seeds if head.training else ()
        batch = in_blocks(batch)
        taught = supervise(batch, config.depth, head.t2d)
        kept = sampled(taught.valid, batch.lengths, seeds, self.shares)
        if batch.rejected is not None:  # besides what was drawn
            kept |= batch.rejected > 0
        taught = dataclasses.replace(taught, valid=taught.valid & kept)
        valid = taught.valid
        # A depth is run where it is learned from, or where a deeper one is that sees it.
        run = valid.flip(0).cummax(0).values.flip(0)
        depths = [valid[0].nonzero()[:, 0], *(rows.nonzero()[:, 0] for rows in run[1:])]
        outs = head.draft(batch.features, batch.input_ids, batch.lengths, depths)
        learned = torch.cat([rows[at] for rows, at in zip(valid, depths, strict=True)])
        weights = config.decay ** torch.arange(config.depth, device=valid.device)
        result = fused_distill(
            head.norm(outs[learned]),
            head.lm_head.weight,
            teachers_over(head.draft_tokens, batch.teacher, taught.supervised[batch.loss_mask], frozen),
            taught.teacher_rows,
            weights.repeat_interleave(valid.sum(-1)),
            config.objective,
            self.loss_rows,
            reverse=taught.reverse,
        )
        return outcome(batch, taught, result, head.draft_tokens, kept.all(0))

    def drafter(self, head: nn.Module | None, device: torch.device) -> PEagleDrafter:
        """A drafter with the fused form of the head."""
        assert isinstance(head, PEagleHead)
        return PEagleDrafter(head, self.config.depth)


def sampled(valid: Tensor, lengths: Sequence[int], seeds: Sequence[int], shares: Sequence[float]) -> Tensor:
    """Where each depth may be trained, [depth, seq] bool; everywhere without `seeds`.

    Of a document's rows at which some depth but the first can be taught, n in all, depth d keeps ceil(share * n), and
    among them all that deeper ones keep. Depth 0 is always trained.

    Args:
        valid: [depth, seq] bool, what can be taught.
        lengths: rows of each document; documents behind those that have a seed keep everything.
        seeds: see `FeatureBatch`.
        shares: of each depth, falling.
    """
    kept = torch.ones(valid.shape, dtype=torch.bool)
    able = valid[1:].any(0).cpu()
    start = 0
    for length, seed in zip(lengths, seeds, strict=False):
        here = slice(start, start + length)
        start += length
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed % (1 << 63)))
        rank = torch.empty_like(order)
        rank[order] = able[here][order].cumsum(0) - 1  # among those that can be taught
        for depth, share in enumerate(shares[1:], start=1):
            kept[depth, here] = able[here] & (rank < math.ceil(share * int(able[here].sum())))
    return kept.to(valid.device)


class PEagleDrafter(CachedDrafter):
    """One pass a call, over what was emitted and the mask positions behind it; trees grow from its logits."""

    def __init__(self, head: PEagleHead, depth: int) -> None:
        super().__init__(FusedEagle(head), head.draft_tokens)
        self.mask_token, self.depth = head.mask_token, depth
        self.mask = head.fuse(head.mask_hidden).detach()  # [hidden]

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        depth = max(1, min(policy.depth, context.depth, self.depth))
        outs = self.take_in(news, [self.mask_token] * (depth - 1), self.mask)
        logits = self.step.logits(outs)  # [batch, depth, draft_vocab]
        level = 0

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            nonlocal level
            level += 1
            return logits[:, level : level + 1].expand(-1, parents.shape[1], -1)

        trees = grow(policy, dataclasses.replace(context, depth=depth), logits[:, 0], expand, self.draft_tokens)
        self.levels = depth  # of one pass: what a level costs is learned as its share
        return trees
