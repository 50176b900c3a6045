"""Hidden-state extraction: one forward pass of the frozen target over every conversation, into the feature store.

Any number of processes, machines and parts makes the same store (see `shards`); vLLM makes one whose hidden states
differ by rounding.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.data.progress import Progress
from sstf.errors import ConfigError, TargetError
from sstf.features.codecs import CodecName, CompressionName
from sstf.features.engines import Engine, RayEngine, TransformersEngine, VllmEngine
from sstf.features.ray_actors import make_in_actors
from sstf.features.shards import Shard, kept_shard, make_shards, shards_of, threads_for
from sstf.features.spec import FeatureSpec, HiddenSignal, TeacherSignal, TopKSignal
from sstf.features.store import FROZEN, Origin, ShardInfo, write_manifest
from sstf.features.vllm_shards import make_with_vllm
from sstf.features.workers import make_in_processes
from sstf.targets import Target, TargetConfig
from sstf.types import TokenSample


class ExtractConfig(Section):
    """What is kept of the target, how, and who computes it.

    `codec` writes the hidden states (see `codecs`), `compression` packs all that is written without loss, `teacher` is
    what the head learns from. `shard_tokens`: unit of resume. `batch_tokens`: tokens of one forward pass, padding
    included. `online`: nothing is stored, training asks the target itself (see `online`). `workers`: processes that
    share the work, each with the target in its memory; 0 and 1 are this process. `engine`: see `engines`.
    """

    codec: CodecName = "bf16"
    compression: CompressionName = "none"
    teacher: TeacherSignal = HiddenSignal()
    shard_tokens: int = Field(default=16384, ge=256)
    batch_tokens: int = Field(default=4096, ge=64)
    online: bool = False
    workers: int = Field(default=0, ge=0)
    engine: Engine = TransformersEngine()

    @model_validator(mode="after")
    def _workers_of_this_engine(self) -> ExtractConfig:
        if isinstance(self.engine, VllmEngine) and self.workers > 1:
            raise ValueError(
                f"extract.workers is {self.workers} with extract.engine.kind vllm, which is one process; use "
                "extract.engine.tensor_parallel for several GPUs, or `--part` on several machines"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a store holds: not who computed it, but for vLLM, whose values are others."""
        kept = self.model_dump(mode="json", exclude={"workers", "engine"})
        return kept | ({"engine": "vllm"} if isinstance(self.engine, VllmEngine) else {})

    @property
    def elsewhere(self) -> bool:
        """Whether other processes than this one run the target."""
        return self.workers > 1 or not isinstance(self.engine, TransformersEngine)


@dataclass(frozen=True)
class Part:
    """A share of the shards, for machines without a queue between them: `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Part:
        """`2/8` is the second of eight.

        Raises:
            ConfigError: it is not of that form.

        >>> Part.parse("2/8")
        Part(index=1, count=8)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"the part is {text!r}; expected I/N with I from 1 to N, such as 2/8")
        return Part(int(found[1]) - 1, int(found[2]))


WHOLE = Part()


def own_target(config: ExtractConfig, target: TargetConfig) -> TargetConfig:
    """The form in which `extract` needs the target in its own process. Where others run it, that is its tokenizer and
    frozen head: the layers stay on the disk."""
    if not config.elsewhere:
        return target
    # vLLM leaves the final norm and the teacher's logits to this process, for which a GPU is wanted.
    device = target.device if isinstance(config.engine, VllmEngine) else "cpu"
    return target.model_copy(update={"device_map": "disk", "device": device})


def extract(
    target: Target,
    samples: Sequence[TokenSample],
    spec: FeatureSpec,
    config: ExtractConfig,
    folder: Path,
    progress: Progress,
    source: TargetConfig | None = None,
    part: Part = WHOLE,
) -> bool:
    """Write the features of `samples` to `folder`; shards that are finished there are kept.

    Args:
        target: the target; where other processes run it, its frozen parts are enough, see `own_target`.
        samples: all conversations, also for a part.
        spec: layers to read.
        config: what is kept and who computes it.
        folder: of the store; shared by all machines that take part.
        progress: for a bar.
        source: how other processes load the target; wanted where there are any.
        part: the shards to make.

    Returns:
        Whether the store is finished: False where shards of other parts are missing.

    Raises:
        TargetError: the target lacks a layer asked for, its context is shorter than a conversation, or its hidden
            states are not finite.
        DamagedDataError: `folder` holds shards that were made from something else, or were altered.
        WorkerError: a process that was started here ended before its work did.
        ConfigError: the engine is not installed, or several workers would share one device map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = origin_of(target, samples, spec, config)
    shards = shards_of(samples, config.shard_tokens)
    mine = shards[part.index :: part.count]
    with progress.start("features", sum(shard.tokens for shard in mine), "tokens") as bar:
        kept = {shard.index for shard in mine if kept_shard(folder, shard, origin)}
        bar.advance(sum(shard.tokens for shard in mine if shard.index in kept))
        todo = [shard for shard in mine if shard.index not in kept]
        if todo and config.elsewhere:
            assert source is not None
            _make_elsewhere(todo, target, source, origin, config, folder, bar.advance)
        elif todo:
            make_shards(target, todo, origin, folder, threads_for(target.device.type), bar.advance)
    finished = [info for shard in shards if (info := kept_shard(folder, shard, origin))]
    if len(finished) < len(shards):
        return False
    close_store(target, origin, folder, finished)
    return True


def _make_elsewhere(
    todo: Sequence[Shard],
    target: Target,
    source: TargetConfig,
    origin: Origin,
    config: ExtractConfig,
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    engine = config.engine
    if isinstance(engine, VllmEngine):
        make_with_vllm(todo, target, source, engine, origin, folder, advance)
        return
    if config.workers > 1 and source.device_map is not None:
        raise ConfigError(
            f"extract.workers is {config.workers} with target.device_map: one model over all devices leaves none for "
            "another; set extract.workers to 0, or take out target.device_map"
        )
    if isinstance(engine, RayEngine):
        make_in_actors(todo, source, origin, folder, max(1, config.workers), engine, advance)
    else:
        make_in_processes(todo, source, origin, folder, config.workers, advance)


def origin_of(target: Target, samples: Sequence[TokenSample], spec: FeatureSpec, config: ExtractConfig) -> Origin:
    """What a store of these samples is made from.

    Raises:
        TargetError: the target's context is shorter than a conversation, or it lacks a layer.
    """
    target.tap(spec.layers)
    longest = max(len(sample.input_ids) for sample in samples)
    if longest > target.spec.max_position_embeddings:
        raise TargetError(
            f"a conversation has {longest} tokens but target {target.spec.name} has a context of "
            f"{target.spec.max_position_embeddings}; lower data.max_length"
        )
    signal = config.teacher
    if isinstance(signal, TopKSignal):
        signal = TopKSignal(k=min(signal.k, target.spec.vocab_size))
    return Origin(
        target=target.spec,
        layers=spec.layers,
        codec=config.codec,
        compression=config.compression,
        teacher=signal,
        chat_template=hashlib.sha256(json.dumps(target.tokenizer.chat_template).encode()).hexdigest(),
        data=data_digest(samples),
        shard_tokens=config.shard_tokens,
        batch_tokens=config.batch_tokens,
        engine="vllm" if isinstance(config.engine, VllmEngine) else "transformers",
    )


def data_digest(samples: Sequence[TokenSample]) -> str:
    """SHA-256 of the samples' names, tokens and masks, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, len(sample.input_ids)]).encode())
        digest.update(np.array(sample.input_ids, dtype="<i4").tobytes())
        digest.update(np.array(sample.loss_mask, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def close_store(target: Target, origin: Origin, folder: Path, shards: list[ShardInfo]) -> None:
    """Add the target's frozen parts, anew since what lies there may be another target's, and the manifest."""
    target.frozen_head.save(folder / FROZEN)
    write_manifest(folder, origin, shards)
