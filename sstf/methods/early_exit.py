"""Early exit (Kangaroo, arXiv 2404.18911): the target's own first layers draft, through a small trained adapter.

Drafting runs the layers below the exit on every drafted token, and verification goes on from their states and keys
(`decode/layered.py`), so the body of the draft costs nothing that the target would not have to compute anyway.

Unlike EAGLE's heads the adapter reads the state OF the token that it continues: at position t it sees h_t, the output
of layer `exit_layer` - 1, and predicts x_{t+1}. In the rows of a batch (`features/dataset.py`):

| row t | features | teacher, of | the state that drafts it stands in |
|---|---|---|---|
| 0 | h_0 | x_2 | row 1 |
| 1 | h_1 | x_3 | row 2 |
| 2 (last of 3) | h_2 | x_4 | h_3, which is not in the batch: not learned from |

Loss: the objective of the target over the draft vocabulary and the adapter, over the rows whose supervised token was
written by the assistant and whose teacher's argmax the draft vocabulary holds. While drafting, the states of drafted
tokens are the target's own, so a later draft position is what the first one is on a longer text: it is reported, and
trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.errors import ConfigError, DecodeError
from sstf.features.dataset import rows_ahead
from sstf.features.spec import FeatureSpec
from sstf.heads import EarlyExitHead, ExitShape, FusedExit
from sstf.losses import CHUNK, Kl, Objective, fused_distill
from sstf.methods.base import WHOLE_VOCABULARY, DraftLimits, News, ShallowPasses, ShallowRows
from sstf.methods.supervision import in_blocks, teachers_over
from sstf.targets import FrozenHead, PreallocatedCache, TargetSpec
from sstf.trees import AnyTree, DraftContext, grow
from sstf.types import DraftTree, FeatureBatch, StepOutput


class EarlyExitConfig(Section):
    """`exit_layer` is how many of the target's first layers draft, `depth` how many positions validation reports.

    Drafting stops where the best token's draft probability is below `threshold` (the paper's is 0.6, behind a last
    token that is still verified; here that token is not drafted). `draft_vocab_size` None is the whole vocabulary.
    `mlp` gives the adapter an MLP as large as a layer's; the paper's has none.
    """

    kind: Literal["early_exit"] = "early_exit"
    reads: ClassVar[tuple[str, ...]] = ("exit_layer",)
    exit_layer: int = 4
    threshold: float = Field(default=0.4, ge=0, le=1)
    depth: int = Field(default=4, ge=1, le=16)
    draft_vocab_size: int | None = Field(default=8192, ge=16)
    mlp: bool = True
    objective: Objective = Kl()


class EarlyExitMethod:
    """A `TrainableMethod`."""

    def __init__(self, config: EarlyExitConfig) -> None:
        self.config = config
        self.loss_rows = CHUNK

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the adapter can propose."""
        return self.config.draft_vocab_size or WHOLE_VOCABULARY

    @property
    def positions(self) -> int:
        """Reported; see the module docstring."""
        return self.config.depth

    @property
    def unrolls(self) -> int:
        """The adapter runs once."""
        return 1

    @property
    def limits(self) -> DraftLimits:
        """None: the first layers run on whatever was drafted."""
        return DraftLimits()

    @property
    def shared_layers(self) -> int:
        """Those below the exit."""
        return self.config.exit_layer

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The last layer below the exit."""
        if not 0 < self.config.exit_layer < target.num_layers:
            raise ConfigError(
                f"method.exit_layer is {self.config.exit_layer}; expected 1 to {target.num_layers - 1}, as target "
                f"{target.name} has {target.num_layers} layers, of which some draft and some verify"
            )
        return FeatureSpec((self.config.exit_layer - 1,))

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> EarlyExitHead:
        """A new adapter, which adds nothing at first: the target's final norm and lm_head read the exit layer."""
        shape = ExitShape(
            hidden_size=target.hidden_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=target.intermediate_size if self.config.mlp else None,
            vocab_size=target.vocab_size,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            max_position_embeddings=target.max_position_embeddings,
            rope_scaling=target.rope_scaling,
        )
        head = EarlyExitHead(shape, frozen.lm_head, draft_tokens)
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                elif parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
            head.norm.weight.copy_(frozen.final_norm)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """See the module docstring."""
        assert isinstance(head, EarlyExitHead)
        batch = in_blocks(batch)
        depth = self.config.depth
        ahead, there = rows_ahead(batch.lengths, depth + 1, batch.loss_mask.device)
        supervised = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
        taught = supervised & there[1]  # what the next row's state drafts, where there is a next row
        rows = taught.nonzero()[:, 0]
        out = head(batch.features, batch.lengths)
        result = fused_distill(
            head.norm(out[rows + 1]),
            head.lm_head,
            teachers_over(head.draft_tokens, batch.teacher, supervised[batch.loss_mask], frozen),
            (supervised.cumsum(0) - 1)[rows],
            torch.ones(len(rows), device=rows.device),
            self.config.objective,
            self.loss_rows,
            reverse=None if batch.rejected is None else _by_row(batch.rejected, ahead, there)[rows],
        )
        losses, overlap = (_spread(part, taught) for part in (result.losses, result.overlap))
        hits = _spread(head.draft_tokens[result.draft_token] == batch.teacher_token[rows], taught)
        # Position i of the chain at row t is what row t + i drafts, given the true text.
        ahead, valid = ahead[:depth], there[:depth] & taught[ahead[:depth]]
        whole = (there[1:] & batch.loss_mask[ahead]).all(0)
        return StepOutput(
            loss=result.loss_sum,
            valid=valid.sum(-1).float(),
            losses=(losses[ahead] * valid).sum(-1),
            hits=(hits[ahead] & valid).sum(-1).float(),
            overlap=(overlap[ahead] * valid).sum(-1),
            chain_hits=hits[ahead][:, whole],
        )

    def drafter(self, head: nn.Module | None, device: torch.device) -> EarlyExitDrafter:
        """A drafter with the fused form of the adapter."""
        assert isinstance(head, EarlyExitHead)
        return EarlyExitDrafter(head, self.config.threshold)


def _by_row(rejected: Tensor, ahead: Tensor, there: Tensor) -> Tensor:
    """[seq], of the row that drafts a pair (position, row): what all its pairs weigh together."""
    depth = len(rejected)
    table = torch.zeros_like(rejected[0])
    return table.index_add_(0, ahead[:depth][there[:depth]], rejected[there[:depth]])


def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """[row] at the places where `rows` [seq] is True, zeros elsewhere."""
    return values.new_zeros(len(rows)).masked_scatter_(rows, values)


class EarlyExitDrafter:
    """Its cache holds, for each slot, the positions of the text before the root, and behind them the root and the nodes
    where the target's own cache has them while drafting. The next call writes them again, from the features."""

    def __init__(self, head: EarlyExitHead, threshold: float) -> None:
        self.step, self.threshold = FusedExit(head), threshold
        self.draft_tokens = head.draft_tokens
        self.lengths: list[int] = []
        self.levels = 0
        self.cache: PreallocatedCache
        self.passes: ShallowPasses

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`."""
        if passes is None:
            raise DecodeError("early exit drafts with the target's own layers, and was given no passes through them")
        fits = len(self.lengths) == slots and self.cache.capacity >= capacity
        self.lengths, self.passes = [0] * slots, passes
        if not fits:
            capacity = -(-capacity // 256) * 256
            self.cache = PreallocatedCache(("attention",), slots, capacity)
            self.step.make_rope(capacity)

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        slots = [one.slot for one in news]
        self._remember(news)
        past = [self.lengths[slot] for slot in slots]
        device = self.draft_tokens.device
        rows = torch.tensor(slots, device=device)

        def adapted(level: ShallowRows) -> Tensor:
            """Draft logits [batch, width, draft_vocab] behind drafted rows."""
            self.levels += 1
            if len(self.lengths) == 1:
                self.cache.write_behind(int(level.places[0, 0]))
            else:
                self.cache.write_rows(rows, level.places, level.mask.shape[-1])
            return self.step.logits(self.step(level.states, level.positions, level.mask, self.cache))

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            return adapted(self.passes.descend(parents, self.draft_tokens[draft_ids]))

        self.levels = 0
        root = adapted(self.passes.root(slots, past, [one.tokens[-1] for one in news]))
        return grow(policy, context, root[:, 0], expand, self.draft_tokens, self.threshold)

    def _remember(self, news: Sequence[News]) -> None:
        """Take in the positions of the text whose states the target computed: all up to the one before the root."""
        device = self.draft_tokens.device
        starts = [self.lengths[one.slot] for one in news]
        counts = torch.tensor([len(one.tokens) for one in news])
        slots = torch.tensor([one.slot for one in news]).repeat_interleave(counts)
        positions = torch.cat(
            [torch.arange(start, start + len(one.tokens)) for one, start in zip(news, starts, strict=True)]
        )
        features = torch.cat([one.features for one in news])
        self.step.remember(features, slots.to(device), positions.to(device), self.cache)
        for one in news:
            self.lengths[one.slot] += len(one.tokens)
