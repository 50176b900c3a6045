"""EAGLE-3 (arXiv 2503.01840): a one-layer head over three target layers, trained by test-time training.

Loss: sum_i decay^i * objective(target over the draft vocabulary, draft at step i), over the positions whose supervised
token was written by the assistant and whose teacher's argmax the draft vocabulary holds. The paper's objective is KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sstf.config_loading import Section
from sstf.errors import ConfigError
from sstf.features.dataset import rows_ahead
from sstf.features.spec import FeatureSpec
from sstf.heads import Eagle3Head, EagleShape, FusedEagle
from sstf.losses import CHUNK, Kl, Objective, Teacher, Teachers, fused_distill, teacher, top_k_teacher
from sstf.methods.base import DraftLimits, News, ShallowPasses
from sstf.row_blocks import filled, missing
from sstf.targets import FrozenHead, PreallocatedCache, TargetSpec
from sstf.targets.graphs import GraphRunner, padded_keys, padded_rows
from sstf.targets.spec import ROPE_TYPES
from sstf.trees import AnyTree, DraftContext, behind, grow
from sstf.types import DraftTree, FeatureBatch, HiddenTeacher, StepOutput, TeacherRows


class Eagle3Config(Section):
    """`layers` are 0-based layer outputs; None takes the paper's {1, L//2 - 1, L - 4}.

    `init` `target` starts the decoder layer, the norms and the draft logits from the target's last layer, final
    norm and lm_head; `random` does so for the lm_head only. `objective` is what each drafted token is trained for.

    What follows shapes the head: None is as in the target, and the norms are described in `heads/eagle.py`. Heads that
    others published differ here.
    """

    kind: Literal["eagle3"] = "eagle3"
    reads: ClassVar[tuple[str, ...]] = ("layers",)  # settings that decide which states are extracted
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    draft_vocab_size: int = Field(default=8192, ge=16)
    ttt_steps: int = Field(default=7, ge=1, le=16)
    ttt_decay: float = Field(default=0.8, gt=0, le=1)
    init: Literal["target", "random"] = "target"
    objective: Objective = Kl()
    intermediate_size: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2, multiple_of=2)
    rms_norm_eps: float | None = Field(default=None, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: dict[str, bool | int | float | str] | None = None  # {rope_type: default} where only the target scales
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Eagle3Config:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("method.norm_before_fc and method.fc_norm norm the same values; keep one of them")
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") not in (*ROPE_TYPES, "default"):
            raise ValueError(
                f"method.rope_scaling has rope_type {self.rope_scaling.get('rope_type')!r}; expected default, "
                f"{', '.join(ROPE_TYPES)}"
            )
        return self

    @model_serializer(mode="wrap")
    def _set_shape_only(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A shape that is left as it is is not written: what is keyed by a configuration keeps its key."""
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if name not in SHAPE_FIELDS or value not in (None, False)}


SHAPE_FIELDS = (
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
)


class Eagle3Method:
    """A `TrainableMethod`."""

    def __init__(self, config: Eagle3Config) -> None:
        self.config = config
        self.loss_rows = CHUNK

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self.config.draft_vocab_size

    @property
    def positions(self) -> int:
        """Steps of test-time training."""
        return self.config.ttt_steps

    @property
    def unrolls(self) -> int:
        """Each step runs the layer."""
        return self.config.ttt_steps

    @property
    def limits(self) -> DraftLimits:
        """None: the head feeds itself."""
        return DraftLimits()

    @property
    def shared_layers(self) -> int:
        """None: the head has a layer of its own."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The configured layers, or low / middle / high."""
        count = target.num_layers
        layers = self.config.layers or (1, count // 2 - 1, count - 4)
        if len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
            raise ConfigError(
                f"method.layers: target {target.name} has layers 0 to {count - 1}, cannot read {list(layers)}; "
                "name different layers in that range"
            )
        return FeatureSpec(tuple(sorted(layers)))

    def shape(self, target: TargetSpec, draft_vocab_size: int) -> EagleShape:
        """Of the head for a target."""
        config = self.config
        return EagleShape(
            hidden_size=target.hidden_size,
            taps=target.hidden_size * len(self.feature_spec(target).layers),
            num_heads=config.num_heads or target.num_heads,
            num_kv_heads=config.num_kv_heads or target.num_kv_heads,
            head_dim=config.head_dim or target.head_dim,
            intermediate_size=config.intermediate_size or target.intermediate_size,
            draft_vocab_size=draft_vocab_size,
            vocab_size=target.vocab_size,
            rms_norm_eps=config.rms_norm_eps or target.rms_norm_eps,
            rope_theta=config.rope_theta or target.rope_theta,
            max_position_embeddings=target.max_position_embeddings,
            rope_scaling=config.rope_scaling or target.rope_scaling,
            norm_before_residual=config.norm_before_residual,
            norm_before_fc=config.norm_before_fc,
            fc_norm=config.fc_norm,
            norm_output=config.norm_output,
        )

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> Eagle3Head:
        """A new head; lm_head rows come from the target's."""
        head = Eagle3Head(self.shape(target, len(draft_tokens)), frozen.embeddings, draft_tokens)
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
            head.lm_head.weight.copy_(frozen.lm_head[draft_tokens])
            head.norm.weight.copy_(frozen.final_norm)
            if self.config.init == "target":
                _start_from_last_layer(head, frozen.last_layer)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Test-time-training loss of one batch; see the module docstring."""
        assert isinstance(head, Eagle3Head)
        batch = _in_blocks(batch)
        steps = self.config.ttt_steps
        ahead, there = rows_ahead(batch.lengths, steps, batch.loss_mask.device)  # [steps, seq]
        supervised = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
        valid = there & supervised[ahead]
        rows = _rows_in_blocks(valid.any(0))  # what no step learns from is not computed
        outs = head.unroll(head.fuse(batch.features), batch.input_ids, batch.lengths, ahead[:, rows])
        counts = valid.sum(-1)
        weights = self.config.ttt_decay ** torch.arange(steps, device=counts.device)
        result = fused_distill(
            head.norm(outs[valid[:, rows]]),
            head.lm_head.weight,
            _teachers_over(head.draft_tokens, batch.teacher, supervised[batch.loss_mask], frozen),
            (supervised.cumsum(0) - 1)[ahead[valid]],
            weights.repeat_interleave(counts),
            self.config.objective,
            self.loss_rows,
        )
        hits = torch.zeros_like(valid)
        hits[valid] = head.draft_tokens[result.draft_token] == batch.teacher_token[ahead[valid]]
        # Anchors whose whole chain lies in supervised text; a token outside the draft vocabulary is a miss.
        whole = (there & batch.loss_mask[ahead]).all(0)
        lengths = counts.tolist()
        return StepOutput(
            loss=result.loss_sum,
            valid=counts.float(),
            losses=torch.stack([part.sum() for part in result.losses.split(lengths)]),
            hits=hits.sum(-1).float(),
            overlap=torch.stack([part.sum() for part in result.overlap.split(lengths)]),
            chain_hits=hits[:, whole],
        )

    def drafter(self, head: nn.Module | None, device: torch.device) -> Eagle3Drafter:
        """A drafter with the fused form of the head."""
        assert isinstance(head, Eagle3Head)
        return Eagle3Drafter(head)


def _in_blocks(batch: FeatureBatch) -> FeatureBatch:
    """With a document behind the others that teaches nothing, so that the rows are whole blocks (`row_blocks`)."""
    lacking = missing(len(batch.input_ids), batch.input_ids.device)
    if not lacking:
        return batch
    return dataclasses.replace(
        batch,
        features=filled(batch.features),
        input_ids=filled(batch.input_ids),
        teacher_token=filled(batch.teacher_token),
        labels=filled(batch.labels),
        loss_mask=filled(batch.loss_mask),
        lengths=(*batch.lengths, lacking),
    )


def _rows_in_blocks(taught: Tensor) -> Tensor:
    """Places of the rows that are True, and of as many others as their blocks have room for; ascending."""
    lacking = missing(int(taught.sum()), taught.device)
    return torch.cat([taught.nonzero()[:, 0], (~taught).nonzero()[:lacking, 0]]).sort().values


def _teachers_over(draft_tokens: Tensor, given: TeacherRows, rows: Tensor, frozen: FrozenHead) -> Teachers:
    """Makes the target's distributions over the draft vocabulary, of the teacher's rows where `rows` [row] is True."""
    if isinstance(given, HiddenTeacher):
        hidden, lse = given.hidden[rows], given.lse[rows]
        small = dataclasses.replace(frozen, lm_head=frozen.lm_head[draft_tokens])  # gathered once for all chunks

        def exact(some: slice) -> Teacher:
            logits = small.native_logits(filled(hidden[some]))
            return teacher(logits[: some.stop - some.start], lse[some])

        return exact
    tokens, log_probs = given.tokens[rows], given.log_probs[rows]

    def top_k(some: slice) -> Teacher:
        return top_k_teacher(tokens[some], log_probs[some], draft_tokens, len(frozen.lm_head))

    return top_k


def _start_from_last_layer(head: Eagle3Head, layer: dict[str, Tensor]) -> None:
    """Copy the target's last decoder layer: fc passes the highest tap on, attention reads the feature half
    as the target's layer reads its input (the embedding half starts at random).

    A parameter that the layer lacks, or that has another shape (a target that is not Llama-like), keeps its random
    start. So the head begins as a rough early exit of the target, not as noise.
    """
    hidden = head.shape.hidden_size
    head.fc.weight.zero_()
    head.fc.weight[:, -hidden:] = torch.eye(hidden)
    names = dict(head.midlayer.named_parameters())
    renamed = {"hidden_norm.weight": "input_layernorm.weight"}
    for name, parameter in names.items():
        source = layer.get(renamed.get(name, name))
        if source is None or name == "input_layernorm.weight":
            continue
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            if source.shape == (parameter.shape[0], hidden):
                parameter[:, hidden:] = source
        elif source.shape == parameter.shape:
            parameter.copy_(source)


class Eagle3Drafter:
    """Drafts with the fused form of the head. Its cache holds, for each slot, the positions whose features the target
    computed, and behind them the nodes of the tree being drafted."""

    def __init__(self, head: Eagle3Head) -> None:
        self.step = FusedEagle(head)
        self.draft_tokens = head.draft_tokens
        self.lengths: list[int] = []
        self.levels = 0
        self.cache: PreallocatedCache
        device = self.draft_tokens.device
        self.graphs = GraphRunner(device) if device.type == "cuda" else None

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`. A cache that is large enough stays, and with it the graphs over its memory."""
        fits = len(self.lengths) == slots and self.cache.capacity >= capacity
        self.lengths = [0] * slots
        if not fits:
            capacity = -(-capacity // 256) * 256
            self.cache = PreallocatedCache(("attention",), slots, capacity)
            self.step.make_rope(capacity)
            if self.graphs:
                self.graphs = GraphRunner(self.draft_tokens.device)

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        slots = [one.slot for one in news]
        last = self._take_in(news, slots)  # [batch, nodes of the last level, hidden]
        past = [self.lengths[slot] for slot in slots]
        batch, device = len(slots), last.device
        level = nodes = 0
        tail = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)  # ancestors of the last level's nodes

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            nonlocal last, tail, level, nodes
            width = parents.shape[1]
            own = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
            tail = torch.cat([_pick(tail, parents), own], -1)
            at = torch.tensor([[length + level] for length in past], device=device).expand(-1, width)
            fed_back = self.step.fed_back(_pick(last, parents))
            last = self._forward(
                slots, fed_back, self.draft_tokens[draft_ids], at, [length + nodes for length in past],
                behind(tail, past, max(past) + nodes + width),
            )  # fmt: skip
            level, nodes = level + 1, nodes + width
            return self.step.logits(last)

        trees = grow(policy, context, self.step.logits(last[:, 0]), expand, self.draft_tokens)
        self.levels = level + 1
        return trees

    def _take_in(self, news: Sequence[News], slots: list[int]) -> Tensor:
        """Run the head over what was emitted; its output at the last token of each sequence, [batch, 1, hidden]."""
        new = [i for i, slot in enumerate(slots) if self.lengths[slot] == 0]
        if not new or len(slots) == 1:
            return self._take_in_together(news, slots)
        # A prompt is much longer than what a pass emits: each on its own, not everything padded to it.
        groups = [[i] for i in new]
        groups += [others] if (others := [i for i in range(len(slots)) if i not in new]) else []
        parts = [self._take_in_together([news[i] for i in group], [slots[i] for i in group]) for group in groups]
        order = torch.tensor([i for group in groups for i in group], device=self.draft_tokens.device)
        return torch.cat(parts)[order.argsort()]

    def _take_in_together(self, news: Sequence[News], slots: list[int]) -> Tensor:
        counts = [len(one.tokens) for one in news]
        longest, device = max(counts), self.draft_tokens.device
        if self.graphs:
            longest = padded_rows(longest) or longest
        past = [self.lengths[slot] for slot in slots]
        tokens = torch.tensor([one.tokens + [0] * (longest - len(one.tokens)) for one in news], device=device)
        features = pad_sequence([one.features for one in news], batch_first=True)
        features = F.pad(features, (0, 0, 0, longest - features.shape[1]))
        steps = torch.arange(longest, device=device)
        causal = (steps <= steps[:, None]).expand(len(slots), -1, -1)
        at = torch.tensor(past, device=device)[:, None] + steps
        mask = behind(causal, past, max(past) + longest)
        out = self._forward(slots, self.step.fuse(features), tokens, at, past, mask)
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        if out.shape[:2] == (1, counts[0]):
            return out[:, -1:]
        return out[torch.arange(len(slots), device=device), torch.tensor(counts, device=device) - 1][:, None]

    def _forward(
        self, slots: list[int], g: Tensor, tokens: Tensor, at: Tensor, starts: list[int], mask: Tensor
    ) -> Tensor:
        """The layer over [batch, rows], whose keys go behind the first `starts` of their slots."""
        if len(self.lengths) == 1 and not self.graphs:
            self.cache.write_behind(starts[0])
            return self.step(g, tokens, at, mask, self.cache)
        # Padding may reach beyond the end; the last place is never seen and takes it.
        last, mask = self.cache.capacity - 1, mask[..., : self.cache.capacity]
        where = torch.tensor(starts, device=g.device)[:, None] + torch.arange(g.shape[1], device=g.device)
        visible = mask.shape[-1]
        if self.graphs:
            visible = padded_keys(visible, self.cache.capacity)
            mask = F.pad(mask, (0, visible - mask.shape[-1]))
        inputs = {
            "g": g,
            "tokens": tokens,
            "at": at.clamp_max(last),
            "mask": mask,
            "slots": torch.tensor(slots, device=g.device),
            "where": where.clamp_max(last),
        }

        def work(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            self.cache.write_rows(x["slots"], x["where"], visible)
            return (self.step(x["g"], x["tokens"], x["at"], x["mask"], self.cache),)

        if self.graphs and padded_rows(g.shape[1]):
            (out,) = self.graphs((*g.shape[:2], visible), inputs, work)
            return out.clone()  # the next level may run in the same graph
        return work(inputs)[0]


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows [batch, width, dim] at index [batch, picked] -> [batch, picked, dim]."""
    if rows.shape[1] == 1:
        return rows.expand(-1, index.shape[1], -1)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
