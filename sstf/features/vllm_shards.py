"""Shards from hidden states that vLLM computed. The final norm and the teacher are computed here, by the target's own
modules, so that the alignment and the meaning of every row are those of the other engines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from sstf.features.record import Features
from sstf.features.shards import Shard, features_of
from sstf.features.store import Origin, write_shard
from sstf.targets import Target, TargetConfig
from sstf.targets.vllm import States, VllmConfig, VllmHiddenStates
from sstf.types import TokenSample

AHEAD = 2  # shards that vLLM may be asked for before the first is written: it computes while we write


def make_with_vllm(
    todo: Sequence[Shard],
    target: Target,
    source: TargetConfig,
    config: VllmConfig,
    origin: Origin,
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """Make the shards `todo`. Of `target`, only the final norm and the frozen head are used.

    Raises:
        ConfigError, WorkerError, TargetError: see `VllmHiddenStates`.
    """
    longest = max(len(sample.input_ids) for shard in todo for sample in shard.samples)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".vllm-") as scratch,
        VllmHiddenStates(
            config, source, origin.layers, target.spec.num_layers, longest, origin.batch_tokens, Path(scratch)
        ) as vllm,
    ):
        following = iter(todo)

        def ask(count: int) -> None:
            for shard in islice(following, count):
                vllm.request(shard.index, [sample.input_ids for sample in shard.samples])

        ask(AHEAD)
        for shard in todo:
            _, states = vllm.next()
            ask(1)
            rows = [_features(target, *pair, origin) for pair in zip(shard.samples, states, strict=True)]
            write_shard(folder, shard.index, [sample.id for sample in shard.samples], rows, origin)
            advance(shard.tokens)


@torch.inference_mode()
def _features(target: Target, sample: TokenSample, states: States, origin: Origin) -> Features:
    hidden = target.final_norm(states.last.to(target.device))
    return features_of(target, sample, states.layers.flatten(1), hidden, origin.teacher)
