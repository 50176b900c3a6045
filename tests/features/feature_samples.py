"""Conversations of random tokens, and their features."""

from __future__ import annotations

from pathlib import Path

import torch

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureSpec, extract
from sstf.targets import Target
from sstf.types import TokenSample

SPEC = FeatureSpec((1, 3, 4))
CONFIG = ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128)


def random_samples(count: int = 30, seed: int = 0) -> list[TokenSample]:
    """5 to 39 tokens each, of which the first quarter is the prompt; two turns where the length is a multiple of 3."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        length = 5 + (i * 7) % 35
        ids = torch.randint(3, 290, (length,), generator=generator).tolist()
        mask = [t >= length // 4 and not (length % 3 == 0 and t == length // 2) for t in range(length)]
        samples.append(TokenSample(f"s{i}", ids, mask))
    return samples


def extract_to(folder: Path, target: Target, samples: list[TokenSample], config: ExtractConfig = CONFIG) -> Path:
    extract(target, samples, SPEC, config, folder, NoProgress())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
