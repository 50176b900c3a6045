"""Texts that a head drafted for, replayed: their features, and where the target rejected what was drafted.

On-policy distillation (Draft-OPD, arXiv 2605.29343) lets the head draft and the target verify, so the text is the
target's, and teaches most where drafts were rejected. A pass whose last emitted token is x_{t+1} is anchored at row t
(`dataset.py`): its draft i stands where x_{t+2+i} came to stand, and is taught by the teacher of row t + i. Of a
prompt x_0 .. x_3, the first token x_4 from the prefill, and passes of three drafts:

| pass | last emitted | row t | emitted | accepted | first rejected draft | weights of drafts 0, 1, 2 at row t |
|---|---|---|---|---|---|---|
| 0 | x_4 | 3 | x_5 x_6 | 1 | 1 | 0, 1, decay |
| 1 | x_6 | 5 | x_7 .. x_10 | 3 | none | 0, 0, 0 |
| 2 | x_10 | 9 | x_11 | 0 | 0 | 1, decay, decay^2 |

(The text goes on behind x_11.) At the first rejected draft, what the head had drafted before is the text itself, so the
teacher of the text is exactly the distribution that the target verified it with. Behind it the head drafted on from a
token that is not in the text; those drafts are taught along the text's own continuation instead, which weighs less by
the decay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.errors import DataError
from sstf.features.source import FeatureSource
from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch


@dataclass(frozen=True)
class Anchor:
    """A pass of decoding: the row it stands at, and the first draft that the target rejected; None if it took all."""

    row: int
    rejected: int | None


def rejected_map(
    anchors: Sequence[Anchor], positions: int, length: int, decay: float
) -> Float[Tensor, "position length"]:
    """decay^(i - first rejected) at draft position i, from the first rejected one on; 0 elsewhere.

    Args:
        anchors: of one document, each at another row.
        positions: draft positions that the method is taught at.
        length: rows of the document. Drafts behind its end have no teacher, and no weight.
        decay: in (0, 1].

    >>> rejected_map([Anchor(0, 1), Anchor(2, None), Anchor(3, 0)], 3, 5, 0.5).T.tolist()
    [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    table = torch.zeros(positions, length)
    for anchor in anchors:
        if anchor.rejected is not None:
            last = min(positions, length - anchor.row)
            falling = decay ** torch.arange(max(0, last - anchor.rejected))
            table[anchor.rejected : last, anchor.row] = falling
    return table


class Replay:
    """A `FeatureSource`: the rollouts' conversations, then some of the training before, by which heads are chosen.

    Args:
        played: features of the rollouts.
        anchors: of each of them.
        ordinary: features of the conversations of the training before.
        held_out: of those, the ones that it did not train on.
        positions: see `rejected_map`.
        decay: see `rejected_map`.
        weight: of the reverse KL at the first rejected draft.

    Raises:
        DataError: the two are of different layers, or of different targets.
    """

    def __init__(
        self,
        played: FeatureSource,
        anchors: Sequence[Sequence[Anchor]],
        ordinary: FeatureSource,
        held_out: Sequence[int],
        positions: int,
        decay: float,
        weight: float,
    ) -> None:
        if played.layers != ordinary.layers or played.target.fingerprint != ordinary.target.fingerprint:
            raise DataError(
                f"{played.name} holds layers {list(played.layers)} of {played.target.name}, {ordinary.name} layers "
                f"{list(ordinary.layers)} of {ordinary.target.name}; expected the same of both: roll out again"
            )
        self.played, self.anchors, self.ordinary = played, anchors, ordinary
        self.positions, self.decay, self.weight = positions, decay, weight
        self._held_out = held_out
        self.ids = [*played.ids, *(ordinary.ids[i] for i in held_out)]
        self.lengths = [*played.lengths, *(ordinary.lengths[i] for i in held_out)]
        self.trained = [*played.trained, *(ordinary.trained[i] for i in held_out)]

    @property
    def held_out(self) -> list[int]:
        """The conversations that are no rollouts."""
        return list(range(len(self.played.ids), len(self.ids)))

    @property
    def name(self) -> str:
        """For messages."""
        return f"rollouts in {self.played.name}"

    @property
    def target(self) -> TargetSpec:
        """See `FeatureSource.target`."""
        return self.played.target

    @property
    def layers(self) -> tuple[int, ...]:
        """See `FeatureSource.layers`."""
        return self.played.layers

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource.made_from`. `data` is that of the rollouts, `prompts_from` where their prompts are."""
        digest = hashlib.sha256(repr([self.decay, self.weight, *map(list, self.anchors)]).encode())
        before = self.ordinary.made_from()
        return self.played.made_from() | {"replayed": digest.hexdigest(), "prompts_from": before.get("data")}

    def _side(self, index: int) -> tuple[FeatureSource, int]:
        count = len(self.played.ids)
        return (self.played, index) if index < count else (self.ordinary, self._held_out[index - count])

    def place(self, index: int) -> str:
        """See `FeatureSource.place`."""
        source, at = self._side(index)
        return source.place(at)

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource.tokens_of`."""
        source, at = self._side(index)
        return source.tokens_of(at)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """See `FeatureSource.batch`. Either of rollouts or of held-out conversations, which have nothing rejected."""
        sides = [self._side(index) for index in indices]
        source, places = sides[0][0], [at for _, at in sides]
        if any(other is not source for other, _ in sides):
            raise ValueError(f"conversations {list(indices)} are rollouts and held-out ones; ask for them apart")
        batch = source.batch(places)
        if source is self.ordinary:
            return batch
        maps = [
            rejected_map(self.anchors[at], self.positions, rows, self.decay)
            for at, rows in zip(places, batch.lengths, strict=True)
        ]
        return replace(batch, rejected=self.weight * torch.cat(maps, 1))

    def frozen_head(self) -> FrozenHead:
        """See `FeatureSource.frozen_head`."""
        return self.ordinary.frozen_head()
