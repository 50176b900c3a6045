"""Hidden-state extraction: one forward pass of the frozen target over every conversation, into the feature store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from sstf.config_loading import Section
from sstf.data.progress import Progress
from sstf.errors import DamagedDataError, TargetError
from sstf.features.spec import FeatureSpec
from sstf.features.store import Features, ShardInfo, finished_shard, write_manifest, write_shard
from sstf.targets import Target
from sstf.types import TokenSample

LOGIT_ROWS = 256  # rows of [row, vocab] logits held at once, whatever the batch


class ExtractConfig(Section):
    """`shard_tokens`: unit of resume. `batch_tokens`: tokens of one forward pass, padding included."""

    shard_tokens: int = Field(default=16384, ge=256)
    batch_tokens: int = Field(default=4096, ge=64)


def extract(
    target: Target,
    samples: Sequence[TokenSample],
    spec: FeatureSpec,
    config: ExtractConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the features of `samples` to `folder`; shards that an earlier run finished are kept.

    Raises:
        TargetError: the target lacks a layer asked for, or its context is shorter than a conversation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    longest = max(len(sample.input_ids) for sample in samples)
    if longest > target.spec.max_position_embeddings:
        raise TargetError(
            f"a conversation has {longest} tokens but target {target.spec.name} has a context of "
            f"{target.spec.max_position_embeddings}; lower data.max_length"
        )
    frozen = folder / "frozen.safetensors"
    if not frozen.exists():
        target.frozen_head.save(frozen)
    infos: list[ShardInfo] = []
    with (
        progress.start("features", sum(len(sample.input_ids) for sample in samples), "tokens") as bar,
        target.tap(spec.layers) as taps,
    ):
        for index, group in enumerate(_shards(samples, config.shard_tokens)):
            info = finished_shard(folder, index)
            if info is None:
                rows: dict[int, Features] = {}
                for batch in batches_of([len(sample.input_ids) for sample in group], config.batch_tokens):
                    chosen = [group[i] for i in batch]
                    rows |= dict(zip(batch, _forward(target, chosen, taps.features), strict=True))
                    bar.advance(sum(len(sample.input_ids) for sample in chosen))
                info = write_shard(folder, index, [s.id for s in group], [rows[i] for i in range(len(group))])
            elif info.ids != [s.id for s in group] or info.lengths != [len(s.input_ids) for s in group]:
                raise DamagedDataError(
                    f"{folder / info.file} holds other conversations; delete {folder} and extract again"
                )
            else:
                bar.advance(sum(info.lengths))
            infos.append(info)
    write_manifest(folder, target.spec, spec.layers, infos)


def _shards(samples: Sequence[TokenSample], shard_tokens: int) -> list[list[TokenSample]]:
    shards: list[list[TokenSample]] = [[]]
    tokens = 0
    for sample in samples:
        if shards[-1] and tokens + len(sample.input_ids) > shard_tokens:
            shards.append([])
            tokens = 0
        shards[-1].append(sample)
        tokens += len(sample.input_ids)
    return shards


def batches_of(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices of conversations of like length, so that little of a batch is padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Descending: the first of a batch is its longest, hence its width.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def _forward(target: Target, samples: list[TokenSample], features: Callable[[], Tensor]) -> list[Features]:
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
    # Padding stands behind the text, so the causal mask alone keeps it out of sight.
    hidden = target.decoder(ids.to(target.device), use_cache=False).last_hidden_state
    tapped = features()
    rows = []
    for i, sample in enumerate(samples):
        length = len(sample.input_ids)
        mask = torch.tensor(sample.loss_mask, dtype=torch.bool)
        token, lse = _teacher(target, hidden[i, :length], mask)
        rows.append(Features(tapped[i, :length].cpu(), hidden[i, :length].cpu(), token, lse, ids[i, :length], mask))
    return rows


def _teacher(target: Target, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax and log-sum-exp of the target where it predicts a trained token: position t where mask[t + 1]."""
    token = torch.full(mask.shape, -1, dtype=torch.int64)
    lse = torch.zeros(mask.shape, dtype=torch.float32)
    for rows in mask[1:].nonzero()[:, 0].split(LOGIT_ROWS):
        logits = target.frozen_head.logits(hidden[rows.to(hidden.device)])
        best, where = logits.max(-1)
        token[rows] = where.cpu()
        # Written out: torch.logsumexp makes two more copies of [row, vocab].
        lse[rows] = (best + logits.sub_(best[:, None]).exp_().sum(-1).log()).cpu()
    return token, lse
