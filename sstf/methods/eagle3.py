"""EAGLE-3 (arXiv 2503.01840): a head over three target layers, trained by test-time training.

Loss: sum_i decay^i * objective(target over the draft vocabulary, draft at step i), over the positions whose supervised
token was written by the assistant and whose teacher's argmax the draft vocabulary holds. The paper's objective is KL.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.features.spec import FeatureSpec
from sstf.heads import Eagle3Head, EagleShape, FusedEagle
from sstf.losses import CHUNK, Kl, Objective, fused_distill
from sstf.methods.base import DraftLimits
from sstf.methods.cached_drafter import FeedbackDrafter
from sstf.methods.eagle3_parts import fused_layers, initialise
from sstf.methods.supervision import in_blocks, outcome, rows_in_blocks, supervise, teachers_over
from sstf.targets import FrozenHead, TargetSpec
from sstf.targets.spec import ROPE_TYPES
from sstf.types import FeatureBatch, StepOutput


class Eagle3Config(Section):
    """`layers` are 0-based layer outputs; None takes the paper's {1, L//2 - 1, L - 4}.

    `init` `target` starts the first decoder layer, the norms and the draft logits from the target's last layer, final
    norm and lm_head, and later layers so that they change nothing yet; `random` does so for the lm_head and the last
    norm only. `objective` is what each drafted token is trained for.

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
    num_layers: int = Field(default=1, ge=1, le=16)

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
        if self.num_layers == 1:
            fields.pop("num_layers", None)  # a part of the fields may be asked for
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
        """Each step runs the layers."""
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
        return fused_layers(self.config.layers, target)

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
            num_layers=config.num_layers,
        )

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> Eagle3Head:
        """A new head; lm_head rows come from the target's."""
        head = Eagle3Head(self.shape(target, len(draft_tokens)), frozen.embeddings, draft_tokens)
        initialise(head, frozen, self.config.init)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Test-time-training loss of one batch; see the module docstring."""
        assert isinstance(head, Eagle3Head)
        batch = in_blocks(batch)
        steps = self.config.ttt_steps
        taught = supervise(batch, steps, head.t2d)
        valid = taught.valid
        rows = rows_in_blocks(valid.any(0))  # what no step learns from is not computed
        outs = head.unroll(head.fuse(batch.features), batch.input_ids, batch.lengths, taught.ahead[:, rows])
        weights = self.config.ttt_decay ** torch.arange(steps, device=valid.device)
        result = fused_distill(
            head.norm(outs[valid[:, rows]]),
            head.lm_head.weight,
            teachers_over(head.draft_tokens, batch.teacher, taught.supervised[batch.loss_mask], frozen),
            taught.teacher_rows,
            weights.repeat_interleave(valid.sum(-1)),
            self.config.objective,
            self.loss_rows,
            reverse=taught.reverse,
        )
        return outcome(batch, taught, result, head.draft_tokens)

    def drafter(self, head: nn.Module | None, device: torch.device) -> FeedbackDrafter:
        """A drafter with the fused form of the head."""
        assert isinstance(head, Eagle3Head)
        return FeedbackDrafter(FusedEagle(head), head.draft_tokens)
