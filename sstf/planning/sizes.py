"""Bytes: what each stage holds in memory on a device, and what a run writes to disk.

Sizes of tensors are exact; how many of them live at once was read off the code and then compared with the peak
resident memory of real processes, Python and its libraries included: on SmolLM2-135M on a CPU they were within 10 % for
training and 20 % for the other stages (`tests/planning/test_memory_on_real_target.py` prints them).

Symbols: H hidden size, V vocabulary.

- Regeneration: the target; keys and values of `slots` rows at full length; the larger of the activations of the
  prompts that are read together and 16 bytes x V a slot.
- Extraction: the target; and for every shard that is made at once: tapped states of a batch; rows of the shard, three
  times while it is written; the larger of a batch's activations and 12 bytes x V x 256 rows.
- Training, without the target: see `train.memory`, which the trainer chooses its sizes by.
- Evaluation: the target; the head in the target's dtype; keys and values of one row.
- Rollouts of an on-policy phase: the same, of `slots` rows.

A target's activations are taken as 4 bytes x (8 H + 3 x intermediate size) a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from sstf.errors import ConfigError
from sstf.features.codecs import CodecName, CompressionName
from sstf.features.record import Record
from sstf.features.shards import LOGIT_ROWS
from sstf.features.spec import TeacherSignal
from sstf.targets import TargetSpec
from sstf.targets.sampling import PREFILL_TOKENS
from sstf.train.budget import LEAST_LOSS_ROWS, choose
from sstf.train.config import TrainConfig
from sstf.train.memory import Part, Trained, peak_parts

# Of kernels, and the heap's slack; measured on a CPU.
WORK_SPACE = Part("work space", 64 * 2**20)


@dataclass(frozen=True)
class StageMemory:
    """What a stage holds on its device at its peak."""

    stage: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """In all."""
        return sum(part.bytes for part in self.parts)


def dtype_size(spec: TargetSpec) -> int:
    """Bytes of one of the target's numbers."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype.itemsize


def weight_bytes(spec: TargetSpec, parameters: int) -> int:
    """Of the target."""
    return parameters * dtype_size(spec)


def cache_bytes(spec: TargetSpec, rows: int, capacity: int) -> int:
    """Keys and values of `rows` sequences of `capacity` tokens."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * rows * capacity * dtype_size(spec)


def parameters_of(head: nn.Module) -> int:
    """Of a head, also of one on the meta device."""
    return sum(parameter.numel() for parameter in head.parameters())


def regeneration(spec: TargetSpec, parameters: int, slots: int, capacity: int, prompt: int) -> StageMemory:
    """Args:
    spec: of the target.
    parameters: of the target.
    slots: sequences written at once.
    capacity: tokens a sequence may have.
    prompt: tokens of a long first prompt.
    """
    together = min(slots * prompt, max(PREFILL_TOKENS, prompt))
    passes = max(together * _target_activation(spec), slots * spec.vocab_size * 16)
    return StageMemory(
        "regeneration",
        (
            Part("weights", weight_bytes(spec, parameters)),
            Part(f"keys and values, {slots} x {capacity} tokens", cache_bytes(spec, slots, capacity)),
            Part("passes", passes),
            WORK_SPACE,
        ),
    )


def extraction(
    spec: TargetSpec, parameters: int, layers: int, batch_tokens: int, shard_tokens: int, at_once: int = 1
) -> StageMemory:
    """Args:
    spec: of the target.
    parameters: of the target.
    layers: tapped.
    batch_tokens: of a forward pass.
    shard_tokens: held until a shard is written.
    at_once: shards that are made beside each other, see `features.shards.threads_for`.
    """
    row = (layers + 1) * spec.hidden_size * dtype_size(spec)
    passes = max(batch_tokens * _target_activation(spec), LOGIT_ROWS * spec.vocab_size * 12)
    return StageMemory(
        "extraction",
        (
            Part("weights", weight_bytes(spec, parameters)),
            Part("tapped states of a batch", at_once * 2 * batch_tokens * row),
            Part("rows of a shard", at_once * shard_tokens * row),
            Part("passes, writing", at_once * max(passes, 2 * shard_tokens * row)),
            WORK_SPACE,
        ),
    )


def training(what: Trained, longest: int, config: TrainConfig, loss_rows: int, available: float) -> StageMemory:
    """With the micro-batch that the trainer would choose in one process; where none fits, with the longest conversation
    alone.

    Args:
        what: is trained.
        longest: tokens of the longest conversation.
        config: of the training.
        loss_rows: the largest chunk of the loss.
        available: bytes, without what the process holds before.
    """
    try:
        sizes = choose(what, longest, config, loss_rows, available).sizes
        rows, loss_rows = sizes.rows, sizes.loss_rows
    except ConfigError:
        rows, loss_rows = longest, LEAST_LOSS_ROWS
    return StageMemory("training", tuple(peak_parts(what, rows, loss_rows)))


def with_target(stage: StageMemory, spec: TargetSpec, parameters: int, batch_tokens: int, layers: int) -> StageMemory:
    """Training that asks the target itself (`extract.online`)."""
    one = extraction(spec, parameters, layers, batch_tokens, 0)
    return StageMemory(stage.stage, (*stage.parts, *(part for part in one.parts if part is not WORK_SPACE)))


def decoding(
    stage: str, spec: TargetSpec, parameters: int, head_parameters: int, slots: int, capacity: int, rows: int
) -> StageMemory:
    """The evaluation, which decodes one sequence at a time, or the rollouts of an on-policy phase.

    Args:
        stage: its name.
        spec: of the target.
        parameters: of the target.
        head_parameters: of the head, which is in the target's dtype.
        slots: sequences decoded at once.
        capacity: tokens a sequence may have.
        rows: of a pass over one sequence whose logits are held.
    """
    passes = max(capacity * _target_activation(spec), slots * rows * spec.vocab_size * 4)
    return StageMemory(
        stage,
        (
            Part("weights", weight_bytes(spec, parameters)),
            Part("head", head_parameters * dtype_size(spec)),
            Part("keys and values", cache_bytes(spec, slots, capacity)),
            Part("passes", passes),
            WORK_SPACE,
        ),
    )


def _target_activation(spec: TargetSpec) -> int:
    """Bytes a token in a forward pass without gradients."""
    return 4 * (8 * spec.hidden_size + 3 * spec.intermediate_size)


# ---- disk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to write features. `bytes_per_token` None where compression would have to be measured."""

    codec: CodecName
    teacher: str
    compression: CompressionName
    bytes_per_token: float | None


def usual_bytes(spec: TargetSpec) -> int:
    """What others write a token: three taps and the last state in bfloat16."""
    return 4 * spec.hidden_size * 2


def feature_bytes(spec: TargetSpec, layers: int, codec: CodecName, signal: TeacherSignal, mask_share: float) -> float:
    """Bytes a token, uncompressed, when `mask_share` of the tokens are trained."""
    record = Record(spec.hidden_size * layers, spec.hidden_size, spec.vocab_size, codec, signal)
    return record.bytes_of(1, 0) + mask_share * record.bytes_of(0, 1)


def forms(
    spec: TargetSpec,
    layers: int,
    signals: Mapping[str, TeacherSignal],
    mask_share: float,
    packed: Mapping[tuple[str, str], float],
) -> list[Form]:
    """Every codec with every teacher, plain and packed.

    Args:
        spec: of the target.
        layers: tapped.
        signals: kinds of teacher by name.
        mask_share: trained tokens over all.
        packed: share of the plain size that zstd leaves, by codec and teacher, where it was measured.
    """
    found: list[Form] = []
    for codec in get_args(CodecName):
        for name, signal in signals.items():
            plain = feature_bytes(spec, layers, codec, signal, mask_share)
            share = packed.get((codec, name))
            found.append(Form(codec, name, "none", plain))
            found.append(Form(codec, name, "zstd", None if share is None else plain * share))
    return found


def checkpoint_bytes(head_parameters: int) -> int:
    """One checkpoint: weights and two moments in float32."""
    return 12 * head_parameters
