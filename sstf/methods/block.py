"""What the block drafters share (DFlash, Domino, DSpark): settings, which blocks are trained, loss and drafter.

A block is the last emitted token, its anchor, and masked places behind it that one pass fills in; see `heads/block.py`.
The block of row t has x_{t+1} as anchor, knows the features of rows 0 .. t, and its draft i (from 0) is supervised by
the teacher of row t + i, that of x_{t+2+i}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sstf.config_loading import Section
from sstf.errors import ConfigError
from sstf.features.dataset import rows_ahead
from sstf.features.spec import FeatureSpec
from sstf.heads import BlockHead, BlockShape
from sstf.losses import CHUNK, Added, CrossEntropy, Distilled, Exponential, Objective, PositionWeights, fused_distill
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits, News, ShallowPasses
from sstf.methods.supervision import reported, teachers_over
from sstf.targets import FrozenHead, PreallocatedCache, TargetSpec
from sstf.targets.spec import ROPE_TYPES
from sstf.trees import AnyTree, DraftContext, grow
from sstf.types import DraftTree, FeatureBatch, StepOutput


class BlockConfig(Section):
    """Settings of every block drafter.

    `layers` are 0-based layer outputs; None takes DFlash's round(1 + i (L - 4) / (n - 1)) with n = 5, or as many fewer
    as a shallow target needs for them to differ. `mask_token_id` is the token whose embedding stands for a place to be
    filled; None takes the token with the smallest embedding, which is one that the target was hardly or never trained
    on (but not below a tenth of the median: norms cannot tell zeros from anything). `draft_vocab_size` None proposes
    all tokens that the target has. `anchors` blocks are trained in each conversation and step, drawn anew; where there
    are fewer rows, all. `weights` says how much each draft counts and `objective` what it is trained for: `ce` is the
    target's most likely token.

    What follows shapes the head; None is as in the target.
    """

    reads: ClassVar[tuple[str, ...]] = ("layers",)  # settings that decide which states are extracted
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    num_layers: int = Field(default=5, ge=1)
    block_size: int = Field(default=8, ge=2, le=64)
    mask_token_id: int | None = Field(default=None, ge=0)
    draft_vocab_size: int | None = Field(default=None, ge=16)
    anchors: int = Field(default=512, ge=1)
    weights: PositionWeights = Exponential()
    objective: Objective = CrossEntropy()
    intermediate_size: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2, multiple_of=2)
    rms_norm_eps: float | None = Field(default=None, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: dict[str, bool | int | float | str] | None = None  # {rope_type: default} where only the target scales

    @model_validator(mode="after")
    def _known_scaling(self) -> BlockConfig:
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") not in (*ROPE_TYPES, "default"):
            raise ValueError(
                f"method.rope_scaling has rope_type {self.rope_scaling.get('rope_type')!r}; expected default, "
                f"{', '.join(ROPE_TYPES)}"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Tokens that the head can propose."""
        return self.draft_vocab_size or WHOLE_VOCABULARY


def default_layers(count: int, wanted: int = 5) -> tuple[int, ...]:
    """DFlash's choice for a target of `count` layers, which is that of its published checkpoints.

    >>> default_layers(36), default_layers(8), default_layers(5), default_layers(4), default_layers(1)
    ((1, 9, 17, 25, 33), (1, 2, 3, 4, 5), (1, 2), (2,), (0,))
    """
    for n in range(wanted, 1, -1):
        layers = [round(1 + i * (count - 4) / (n - 1)) for i in range(n)]
        if count > 4 and len(set(layers)) == n:
            return tuple(layers)
    return (count // 2,)


def block_features(config: BlockConfig, target: TargetSpec) -> FeatureSpec:
    """Which layers are read.

    Raises:
        ConfigError: the target lacks them, or the mask token.
    """
    count = target.num_layers
    layers = config.layers or default_layers(count)
    if len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ConfigError(
            f"method.layers: target {target.name} has layers 0 to {count - 1}, cannot read {list(layers)}; "
            "name different layers in that range"
        )
    if config.mask_token_id is not None and config.mask_token_id >= target.vocab_size:
        raise ConfigError(
            f"method.mask_token_id is {config.mask_token_id}, target {target.name} has tokens 0 to "
            f"{target.vocab_size - 1}; name one that its texts do not hold, or leave it out"
        )
    return FeatureSpec(tuple(sorted(layers)))


def block_shape(config: BlockConfig, target: TargetSpec, first_slot: int) -> BlockShape:
    """Of the head for a target."""
    return BlockShape(
        hidden_size=target.hidden_size,
        taps=target.hidden_size * len(block_features(config, target).layers),
        num_layers=config.num_layers,
        num_heads=config.num_heads or target.num_heads,
        num_kv_heads=config.num_kv_heads or target.num_kv_heads,
        head_dim=config.head_dim or target.head_dim,
        intermediate_size=config.intermediate_size or target.intermediate_size,
        vocab_size=target.vocab_size,
        rms_norm_eps=config.rms_norm_eps or target.rms_norm_eps,
        rope_theta=config.rope_theta or target.rope_theta,
        max_position_embeddings=target.max_position_embeddings,
        rope_scaling=config.rope_scaling or target.rope_scaling,
        block_size=config.block_size,
        first_slot=first_slot,
    )


def mask_token_of(config: BlockConfig, embeddings: Tensor) -> int:
    """See `BlockConfig`."""
    if config.mask_token_id is not None:
        return config.mask_token_id
    if embeddings.is_meta:  # a head that is only counted
        return 0
    size = torch.cat([rows.float().norm(dim=-1) for rows in embeddings.split(8192)])
    return int(size.masked_fill(size < 0.1 * size.median(), float("inf")).argmin())


@torch.no_grad()
def initialise(head: BlockHead, frozen: FrozenHead) -> None:
    """Small random layers behind the target's own final norm, which its lm_head expects."""
    for parameter in head.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    head.norm.weight.copy_(frozen.final_norm)
    if head.correction is not None:  # which begins as nothing
        head.correction.zero_()


class BlockMethod:
    """What the `TrainableMethod`s of block drafters have in common."""

    first_slot: ClassVar[int] = 1  # of a block that predicts: behind the anchor, or the anchor's own

    def __init__(self, config: BlockConfig) -> None:
        self.loss_rows = CHUNK
        self._block = config

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self._block.vocabulary

    @property
    def positions(self) -> int:
        """Drafts of a block."""
        return self._block.block_size - self.first_slot

    @property
    def unrolls(self) -> int:
        """One: blocks are computed some at a time, and kept as what `lm_head` reads."""
        return 1

    @property
    def limits(self) -> DraftLimits:
        """A block is all that can be drafted."""
        return DraftLimits(depth=self.positions)

    @property
    def shared_layers(self) -> int:
        """None: the head has layers of its own."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """See `BlockConfig.layers`."""
        return block_features(self._block, target)


# ---- loss ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Those of a batch that are trained."""

    rows: list[int]  # of the batch, ascending: where a block has its anchor
    ahead: Tensor  # [row, drafts] int64, batch rows whose teachers the drafts have
    valid: Tensor  # [drafts, row] bool, drafts that are supervised
    whole: Tensor  # [row] bool, the block lies in supervised text


def draw_blocks(batch: FeatureBatch, supervised: Tensor, drafts: int, anchors: int) -> Blocks:
    """Blocks whose first draft was written by the assistant, as at decoding: of each document `anchors`, drawn by its
    own seed; all where there are fewer, or no seeds. Blocks with a rejected draft come before the others.

    Args:
        batch: to train on.
        supervised: [seq] bool, rows whose teacher a draft can have.
        drafts: of a block.
        anchors: blocks of a document at most.
    """
    rows: list[int] = []
    start = 0
    first = batch.loss_mask.new_zeros(len(batch.loss_mask)) if batch.rejected is None else (batch.rejected > 0).any(0)
    first = first.cpu()
    for i, part in enumerate(batch.loss_mask.cpu().split(batch.lengths)):
        places = part.nonzero()[:, 0]
        if batch.seeds and len(places) > anchors:
            generator = torch.Generator().manual_seed(batch.seeds[i] % (1 << 63))
            order = torch.randperm(len(places), generator=generator)
            order = order[first[places[order] + start].int().argsort(descending=True, stable=True)]
            places = places[order[:anchors].sort().values]
        rows += (places + start).tolist()
        start += len(part)
    device = batch.loss_mask.device
    at = torch.tensor(rows, dtype=torch.int64, device=device)
    ahead, there = (table[:, at] for table in rows_ahead(batch.lengths, drafts, device))
    return Blocks(rows, ahead.T, there & supervised[ahead], (there & batch.loss_mask[ahead]).all(0))


class Judged:
    """The drafts of some blocks against the target: what a method's loss is made of."""

    def __init__(self, head: BlockHead, batch: FeatureBatch, frozen: FrozenHead, anchors: int, loss_rows: int) -> None:
        self.head, self.batch, self.loss_rows = head, batch, loss_rows
        supervised = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
        self.blocks = blocks = draw_blocks(batch, supervised, head.shape.drafts, anchors)
        self.hidden = head.fill(batch.features, batch.input_ids, batch.lengths, blocks.rows)
        self.tokens = batch.input_ids[blocks.ahead]  # [row, drafts], x_{t+1} .. of each block
        self._teachers = teachers_over(head.draft_tokens, batch.teacher, supervised[batch.loss_mask], frozen)
        # Of the reverse KL, in the order of `of_valid`.
        self._reverse = None if batch.rejected is None else batch.rejected[:, blocks.rows][blocks.valid]
        self._teacher_rows = (supervised.cumsum(0) - 1)[blocks.ahead.T[blocks.valid]]

    def of_valid(self, table: Tensor) -> Tensor:
        """[row, drafts, ...] -> [valid drafts, ...], the first drafts of all blocks first."""
        return table.transpose(0, 1)[self.blocks.valid]

    def distill(self, objective: Objective, weights: Tensor, low_rank: Tensor | None = None) -> Distilled:
        """Against the target, drafts in the order of `of_valid`.

        Args:
            objective: what each draft is trained for.
            weights: [valid drafts].
            low_rank: [valid drafts, rank], of a head with a correction; None leaves that out.
        """
        added = None
        if low_rank is not None:
            assert self.head.correction is not None
            added = Added(low_rank, self.head.correction)
        return fused_distill(
            self.of_valid(self.hidden), self.head.lm_head, self._teachers, self._teacher_rows, weights, objective,
            self.loss_rows, added, self._reverse,
        )  # fmt: skip

    def weights(self, how: PositionWeights, low_rank: Tensor | None = None) -> Tensor:
        """[valid drafts] by position; those that depend on the draft's present chances look at them first."""
        valid = self.blocks.valid
        chances = torch.ones(valid.shape, device=valid.device)
        if how.adaptive:
            with torch.no_grad():
                ones = torch.ones(int(valid.sum()), device=valid.device)
                chances[valid] = (-self.distill(CrossEntropy(), ones, low_rank).losses).exp().to(chances.dtype)
        return how.weights(chances, valid)[valid]

    def output(self, loss: Tensor, found: Distilled) -> StepOutput:
        """What the trainer gets, of a summed loss and the drafts as they are decoded."""
        blocks = self.blocks
        taught = self.batch.teacher_token[blocks.ahead.T]
        return reported(loss, found, self.head.draft_tokens, taught, blocks.valid, blocks.whole)


# ---- drafting --------------------------------------------------------------------------------------------------------


class BlockDrafter:
    """Drafts with one pass a block. Its cache holds, for each slot and layer, ctx of the positions that the target has
    seen, and behind them the block, which the next pass overwrites.

    Every node of a tree is a place of the same block, so a node's logits are those of its depth, corrected by its path.
    """

    def __init__(self, head: BlockHead) -> None:
        self.head = head
        self.draft_tokens = head.draft_tokens
        self.correction = head.correction
        self.lengths: list[int] = []
        self.levels = 1
        self.cache: PreallocatedCache

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`. A cache that is large enough stays."""
        capacity += self.head.shape.block_size + 1  # and a place that takes padding
        fits = len(self.lengths) == slots and self.cache.capacity >= capacity
        self.lengths = [0] * slots
        if not fits:
            kinds = ("attention",) * self.head.shape.num_layers
            self.cache = PreallocatedCache(kinds, slots, -(-capacity // 256) * 256)

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        head = self.head
        drafts = head.shape.drafts
        hidden = self._take_in(news)  # [batch, drafts, hidden]
        anchors = torch.tensor([one.tokens[-1] for one in news], device=hidden.device)
        base = F.linear(hidden, head.lm_head)  # [batch, drafts, draft_vocab]
        state = head.path_start(anchors)[:, None]  # [batch, nodes of the last level, state]
        level = 0

        def logits() -> Tensor:
            here = base[:, level : level + 1]
            if self.correction is None:
                return here.expand(-1, state.shape[1], -1)
            of_slot = hidden[:, level : level + 1].expand(-1, state.shape[1], -1)
            return here + F.linear(head.low_rank(of_slot, state), self.correction)

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            nonlocal state, level
            level += 1
            above = state.gather(1, parents[..., None].expand(-1, -1, state.shape[-1]))
            state = head.path_next(above, self.draft_tokens[draft_ids])
            return logits()

        within = replace(context, depth=min(context.depth, drafts))
        return self.finish(
            grow(policy, within, logits()[:, 0], expand, self.draft_tokens), hidden, news, policy, context
        )

    def finish(
        self, trees: list[DraftTree], hidden: Tensor, news: Sequence[News], policy: AnyTree, context: DraftContext
    ) -> list[DraftTree]:
        """What of the trees is verified; here all. Whether a node is may depend on the nodes above it, never on its own
        token: that would bias the text.

        Args:
            trees: as they were grown.
            hidden: [batch, drafts, hidden], what `lm_head` read.
            news: of `propose`; the last token of each is its block's anchor.
            policy: that they were grown by.
            context: of `propose`.
        """
        return trees

    def _take_in(self, news: Sequence[News]) -> Tensor:
        """Read what was emitted and fill one block a sequence: [batch, drafts, hidden]."""
        new = [i for i, one in enumerate(news) if self.lengths[one.slot] == 0]
        if not new or len(news) == 1:
            return self._fill(news)
        # A prompt is much longer than what a pass emits: each on its own, not everything padded to it.
        groups = [[i] for i in new]
        groups += [others] if (others := [i for i in range(len(news)) if i not in new]) else []
        parts = [self._fill([news[i] for i in group]) for group in groups]
        order = torch.tensor([i for group in groups for i in group], device=self.draft_tokens.device)
        return torch.cat(parts)[order.argsort()]

    def _fill(self, news: Sequence[News]) -> Tensor:
        head, device = self.head, self.draft_tokens.device
        counts = torch.tensor([len(one.tokens) for one in news], device=device)
        past = torch.tensor([self.lengths[one.slot] for one in news], device=device)
        features = pad_sequence([one.features for one in news], batch_first=True)
        at = past[:, None] + torch.arange(features.shape[1], device=device)
        own = (past + counts)[:, None] + torch.arange(head.shape.block_size, device=device)
        # Padding goes to the last place, which nobody sees.
        where = torch.cat([at.masked_fill(at >= own[:, :1], self.cache.capacity - 1), own], 1)
        for one in news:
            self.lengths[one.slot] += len(one.tokens)
        visible = max(self.lengths[one.slot] for one in news) + head.shape.block_size
        self.cache.write_rows(torch.tensor([one.slot for one in news], device=device), where, visible)
        mask = torch.arange(visible, device=device) <= own[:, -1:]
        turn = head.rope(own)
        context = head.context(features, at)
        x = head.block(torch.tensor([one.tokens[-1] for one in news], device=device))
        for i, layer in enumerate(head.decoder):
            query, *own_key_value = layer.qkv(x, *turn)
            new_keys, new_values = (
                torch.cat(pair, 1).transpose(1, 2)
                for pair in zip(context[2 * i : 2 * i + 2], own_key_value, strict=True)
            )
            keys, values = self.cache.update(new_keys, new_values, i)
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=mask[:, None, None], enable_gqa=True
            )
            x = layer.finish(x, attended.transpose(1, 2))
        out: Tensor = head.norm(x[:, head.shape.first_slot :])
        return out
