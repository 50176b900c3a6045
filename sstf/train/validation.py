"""Figures on held-out conversations, by which heads are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sstf.losses import accepted_drafts
from sstf.train.parallel import Parallel
from sstf.types import FeatureBatch


@dataclass(frozen=True)
class Validation:
    """Held-out figures, one entry a test-time-training step.

    `simulated_accepted_length` = 1 + mean over anchors of the leading hits of a greedy chain of `ttt_steps`, where a
    hit is the draft's argmax being the target's argmax; it is what a chain of that depth would reach if every
    position were an anchor.
    """

    simulated_accepted_length: float
    accuracy: list[float]
    overlap: list[float]
    loss: list[float]

    def figures(self) -> dict[str, float]:
        """Under the names that trackers get."""
        out = {"val/simulated_accepted_length": self.simulated_accepted_length}
        for name in ("accuracy", "overlap", "loss"):
            out |= {f"val/{name}/{i}": value for i, value in enumerate(getattr(self, name))}
        return out


def validated(parallel: Parallel, batches: Iterable[FeatureBatch]) -> Validation:
    """Over the batches of all processes; every process brings equally many."""
    sums = accepted = torch.zeros(())
    for batch in batches:
        output = parallel.evaluate(batch)
        chains = accepted_drafts(output.chain_hits)
        sums = sums + torch.stack([output.valid, output.losses, output.hits, output.overlap]).cpu()
        accepted = accepted + torch.tensor([float(chains.sum()), len(chains)])
    sums = parallel.launch.reduce(sums).cpu()
    accepted = parallel.launch.reduce(accepted).cpu()
    means = (sums[1:] / sums[0].clamp_min(1.0)).tolist()
    return Validation(1 + float(accepted[0] / accepted[1].clamp_min(1.0)), means[1], means[2], means[0])
