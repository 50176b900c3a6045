"""The batches of one process: which conversations they hold, loaded while the ones before are computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sstf.cores import leave_cores_to_others
from sstf.features import FeatureSource, prefetched, to_device
from sstf.train.parallel import Launch
from sstf.train.plan import micro_batches, shares
from sstf.types import FeatureBatch, HiddenTeacher, TopKTeacher

Piece = tuple[tuple[int, ...], bool]  # conversations, and whether they are supervised


class Feed:
    """Micro-batches of up to `batch_tokens` tokens (which may be lowered on the way) for one of several processes.

    Every process gets equally many for a step, because processes that share parameters or gradients meet in each.
    One that has fewer computes a short conversation once more, without supervision.
    """

    def __init__(
        self,
        source: FeatureSource,
        launch: Launch,
        plan: Sequence[Sequence[int]],
        batch_tokens: int,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Args:
        source: of the features.
        launch: which process this is, of how many.
        plan: conversations of each step.
        batch_tokens: computed at once.
        noise: see `noisy`.
        seed: of the noise.
        """
        self.source, self.launch, self.plan = source, launch, plan
        self.noise, self.seed = noise, seed
        self.rows = [max(0, length - 2) for length in source.lengths]
        self._batch_tokens = batch_tokens
        self._next = 0  # step whose batches the prefetching thread hands out next
        self._ahead: Iterator[FeatureBatch] | None = None
        self.waited = 0.0  # seconds in which there was no batch yet

    @property
    def batch_tokens(self) -> int:
        """Tokens computed at once; a longer conversation is computed alone."""
        return self._batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, tokens: int) -> None:
        self._batch_tokens = tokens
        self._ahead = None

    def step(self, step: int) -> Iterator[tuple[FeatureBatch, bool]]:
        """This process's micro-batches of a step, each with whether it is the last one."""
        if self._ahead is None or self._next != step:
            coming = ((at, piece) for at in range(step, len(self.plan)) for piece in self.pieces(self.plan[at]))
            self._ahead = prefetched(lambda key: self._load(key[1], key[0]), coming)
        count = len(self.pieces(self.plan[step]))
        self._next = -1  # left half-way, a step begins anew
        for i in range(count):
            started = time.perf_counter()
            batch = next(self._ahead)
            self.waited += time.perf_counter() - started
            yield batch, i + 1 == count
        self._next = step + 1

    def once(self, conversations: Sequence[int]) -> Iterator[FeatureBatch]:
        """This process's share of some conversations, without noise."""
        return prefetched(self._load, self.pieces(conversations))

    def pieces(self, conversations: Sequence[int]) -> list[Piece]:
        """What `once` loads."""
        dealt = [
            micro_batches(share, self.rows, self._batch_tokens)
            for share in shares(conversations, self.rows, self.launch.processes)
        ]
        mine: list[Piece] = [(tuple(piece), True) for piece in dealt[self.launch.rank]]
        shortest = min(conversations, key=lambda i: self.rows[i])
        return mine + [((shortest,), False)] * (max(map(len, dealt)) - len(mine))

    def _load(self, piece: Piece, step: int | None = None) -> FeatureBatch:
        if self.launch.device.type == "cpu":
            leave_cores_to_others()  # from the thread that loads to the one that trains
        conversations, supervised = piece
        batch = self.source.batch(conversations)
        if not supervised:
            batch = unsupervised(batch)
        # One a conversation, so that what is drawn does not depend on which of them meet in a batch.
        at = -1 if step is None else step
        seeds = tuple((self.seed * 1_000_003 + at) * 1_000_003 + i for i in conversations)
        # What replays rejected drafts goes on with the loss that the training before it ended with.
        replayed = batch.rejected is not None
        batch = replace(batch, seeds=seeds, progress=1.0 if step is None or replayed else step / len(self.plan))
        if self.noise and step is not None:
            batch = noisy(batch, self.noise)
        return to_device(batch, self.launch.device)


def unsupervised(batch: FeatureBatch) -> FeatureBatch:
    """The same rows, none of which has a teacher."""
    teacher = batch.teacher
    nothing = (
        HiddenTeacher(teacher.hidden[:0], teacher.lse[:0])
        if isinstance(teacher, HiddenTeacher)
        else TopKTeacher(teacher.tokens[:0], teacher.log_probs[:0])
    )
    return replace(batch, teacher=nothing, loss_mask=torch.zeros_like(batch.loss_mask))


def noisy(batch: FeatureBatch, share: float) -> FeatureBatch:
    """Normal noise on the features, whose deviation is `share` of the root mean square of each row."""
    parts = []
    for rows, seed in zip(batch.features.split(list(batch.lengths)), batch.seeds, strict=True):
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        size = rows.float().square().mean(-1, keepdim=True).sqrt()
        parts.append(torch.randn(rows.shape, generator=generator) * (share * size) + rows)
    return replace(batch, features=torch.cat(parts).to(batch.features.dtype))
