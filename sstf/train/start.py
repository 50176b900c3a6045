"""Where a training begins: at its own newest checkpoint, at another training's, at a finished head, or anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sstf.errors import ConfigError, HeadError
from sstf.features import FeatureSource
from sstf.features.vocabulary import teacher_mass, token_counts
from sstf.formats import read_any
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import StoredHead, check_embeddings
from sstf.methods.eagle3 import SHAPE_FIELDS
from sstf.targets import FrozenHead, TargetSpec
from sstf.targets.draft_vocab import choose_draft_vocab
from sstf.train.checkpoint import Checkpoint, Progress, check_origin, list_checkpoints, read_checkpoint
from sstf.train.config import TrainConfig
from sstf.train.parallel import Launch


def origin_of(source: FeatureSource, method_config: Any, config: TrainConfig, seed: int) -> dict[str, Any]:
    """What has to be the same for a checkpoint to go on: what is trained, on which conversations, in which order."""
    rows = list(zip(source.ids, source.lengths, source.trained, strict=True))
    return {
        "method": method_config.model_dump(mode="json"),
        "target": source.target.fingerprint,
        "conversations": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "seed": seed,
        "train.step_tokens": config.step_tokens,
        "train.validation_conversations": config.validation_conversations,
        "train.optimizer.kind": config.optimizer.kind,
    }


def find_start(folder: Path, config: TrainConfig, own: dict[str, Any], source: FeatureSource) -> Checkpoint | None:
    """The state from which to train; None to begin anew.

    Raises:
        ConfigError: what is to be continued is of another method, other data or another target.
        DamagedDataError: a checkpoint or head was cut off or altered.
    """
    found = list_checkpoints(folder / "checkpoints")
    if not found and config.resume_from:
        found = list_checkpoints(config.resume_from / "checkpoints")
        if not found:
            raise ConfigError(
                f"train.resume_from: {config.resume_from} holds no checkpoint; expected the folder of a training, with "
                "checkpoints/step-..."
            )
    if found:
        checkpoint = read_checkpoint(found[-1])
        check_origin(found[-1], checkpoint.origin, own)
        return checkpoint
    return _from_head(config.warm_start, own, source) if config.warm_start else None


def _from_head(path: Path, own: dict[str, Any], source: FeatureSource) -> Checkpoint:
    try:
        stored = read_any(path, source.target)
        if stored.embeddings is not None:
            check_embeddings(stored, source.frozen_head())
    except HeadError as error:
        raise ConfigError(f"train.warm_start: {error}") from None
    kind = own["method"]["kind"]
    if stored.config.kind != kind:
        raise ConfigError(f"train.warm_start: {path} is a head of method {stored.config.kind}, this run trains {kind}")
    here = source.target
    if (stored.target.hidden_size, stored.target.vocab_size) != (here.hidden_size, here.vocab_size):
        raise ConfigError(
            f"train.warm_start: {path} was trained for {stored.target.name} (hidden size {stored.target.hidden_size}, "
            f"vocabulary {stored.target.vocab_size}), this target has {here.hidden_size} and {here.vocab_size}"
        )
    if stored.layers != source.layers:
        raise ConfigError(
            f"train.warm_start: {path} reads layers {list(stored.layers)}, these features are of "
            f"{list(source.layers)}; set method.layers"
        )
    if others := _other_shape(stored, own["method"], here):
        settings = " ".join(f"method.{name}={json.dumps(value)}" for name, value in others.items())
        raise ConfigError(f"train.warm_start: {path} has another shape than the head of this run; set {settings}")
    return Checkpoint(Progress(), own, stored.tensors)


def _other_shape(stored: StoredHead, method: dict[str, Any], target: TargetSpec) -> dict[str, Any]:
    """Where a head is not of the shape that `method` makes for `target`, with the head's own values."""

    def shape(own: Any, given: TargetSpec) -> dict[str, Any]:
        values = {name: own.get(name) or getattr(given, name, False) for name in SHAPE_FIELDS}
        return values | {
            "rope_scaling": values["rope_scaling"] or {"rope_type": "default"},
            "num_layers": own.get("num_layers", 1),
        }

    theirs, ours = shape(stored.config.model_dump(), stored.target), shape(method, target)
    return {name: value for name, value in theirs.items() if value != ours[name]}


def draft_tokens_of(head: dict[str, Tensor]) -> Tensor:
    """Target ids of a stored head's draft vocabulary, [draft_vocab] int64."""
    return head["d2t"] + torch.arange(len(head["d2t"]))


def choose_draft_tokens(
    source: FeatureSource,
    training: list[int],
    method: TrainableMethod,
    config: TrainConfig,
    frozen: FrozenHead,
    seed: int,
    launch: Launch,
) -> Tensor:
    """The draft vocabulary, from the training conversations; the same in every process."""
    counts = token_counts(source, training)
    size = min(method.draft_vocab_size, source.target.vocab_size)
    if config.draft_vocab == "frequency":
        return choose_draft_vocab(counts, size)
    shuffled = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    order = [training[i] for i in shuffled]
    mass, used = teacher_mass(source, frozen, order)
    scores = mass + token_counts(source, order[used:])
    # Sums of floats may round differently elsewhere, and two close tokens change places.
    return launch.broadcast(choose_draft_vocab(scores, size, then=counts)).cpu()
