"""Accepted length of a head in training by real decoding (`tau_real`): what simulation only estimates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sstf.decode import SpeculativeDecoder
from sstf.features import FeatureSource, prompt_of
from sstf.methods.checkpoint import load_head
from sstf.targets import Target
from sstf.train.config import RealDecodeConfig
from sstf.trees import Chain


class RealDecode:
    """Decodes the beginnings of held-out conversations greedily with a chain of drafts.

    The head is read back from the folder in which it was saved, so that what is measured is what would be published.

    Args:
        target: the frozen model.
        depth: tokens drafted a pass.
        config: how much is decoded.
    """

    def __init__(self, target: Target, depth: int, config: RealDecodeConfig) -> None:
        self.target, self.depth, self.config = target, depth, config

    def __call__(self, head: Path, source: FeatureSource, held_out: Sequence[int]) -> float:
        """Tokens emitted a verify pass, the bonus token included; 0 when nothing could be decoded."""
        decoder = SpeculativeDecoder(self.target, load_head(head, self.target), Chain(depth=self.depth))
        lengths: list[int] = []
        for index in held_out[: self.config.prompts]:
            if prompt := prompt_of(source, index):
                lengths += decoder.generate(prompt, self.config.max_new_tokens).accepted_lengths
        return sum(lengths) / len(lengths) if lengths else 0.0
