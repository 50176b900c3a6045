"""Shards: what extraction is divided into, and how one is made.

Conversations are dealt out to shards, and those of a shard to batches, by their lengths alone. A batch is computed by
one thread on a CPU, because torch divides a matrix product differently among two, and the last bits with it. So a shard
can be made by itself, beside others, by any process, and has the same bytes whoever made it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sstf.errors import DamagedDataError, TargetError
from sstf.features.record import Features, taught
from sstf.features.spec import TeacherSignal, TopKSignal
from sstf.features.store import Origin, ShardInfo, finished_shard, write_shard
from sstf.targets import Target
from sstf.types import HiddenTeacher, TeacherRows, TokenSample, TopKTeacher

LOGIT_ROWS = 128  # rows of [row, vocab] logits held at once, whatever the batch; more would be new memory each time


@dataclass(frozen=True)
class Shard:
    """Conversations that are written, checked and resumed together."""

    index: int
    samples: list[TokenSample]

    @property
    def tokens(self) -> int:
        """Of all its conversations."""
        return sum(len(sample.input_ids) for sample in self.samples)


def shards_of(samples: Sequence[TokenSample], shard_tokens: int) -> list[Shard]:
    """Whole conversations in order, up to `shard_tokens` a shard; a longer one has a shard of its own."""
    groups: list[list[TokenSample]] = [[]]
    tokens = 0
    for sample in samples:
        if groups[-1] and tokens + len(sample.input_ids) > shard_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(sample)
        tokens += len(sample.input_ids)
    return [Shard(index, group) for index, group in enumerate(groups)]


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


def kept_shard(folder: Path, shard: Shard, origin: Origin) -> ShardInfo | None:
    """The description of a shard that was finished earlier, else None.

    Raises:
        DamagedDataError: what is there was made from something else, or altered.
    """
    info = finished_shard(folder, shard.index, origin)
    if info is not None and (
        info.ids != [sample.id for sample in shard.samples]
        or info.lengths != [len(sample.input_ids) for sample in shard.samples]
    ):
        raise DamagedDataError(
            f"{folder / info.file} holds other conversations; delete {folder} and run `sstf extract` again"
        )
    return info


def make_shard(target: Target, shard: Shard, origin: Origin, folder: Path, advance: Callable[[int], None]) -> ShardInfo:
    """Compute and write a shard; `advance` is called with the tokens done since the last call.

    Raises:
        TargetError: see `read_features`; or the target lacks a layer.
    """
    samples = shard.samples
    rows: dict[int, Features] = {}
    with target.tap(origin.layers) as taps:
        for batch in batches_of([len(sample.input_ids) for sample in samples], origin.batch_tokens):
            chosen = [samples[i] for i in batch]
            rows |= dict(zip(batch, read_features(target, chosen, taps.features, origin.teacher), strict=True))
            advance(sum(len(sample.input_ids) for sample in chosen))
    return write_shard(folder, shard.index, [s.id for s in samples], [rows[i] for i in range(len(samples))], origin)


def threads_for(device_type: str, processes: int = 1) -> int:
    """Shards to make at once in each of so many processes of this machine: one a core, or one on a GPU."""
    return max(1, torch.get_num_threads() // processes) if device_type == "cpu" else 1


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted."""


def make_shards(
    target: Target,
    shards: Iterable[Shard],
    origin: Origin,
    folder: Path,
    threads: int,
    advance: Callable[[int], None],
    done: Callable[[int], None] = lambda index: None,
) -> None:
    """Make shards as they come, up to `threads` at once. `advance` and `done` (with a shard's index) are called by one
    thread at a time.

    Raises:
        TargetError, OSError: of the first shard that failed; the others are given up, finished ones are kept.
    """
    _ = target.frozen_head  # read and checked here, and not by several threads at once
    waiting, taking, reporting = iter(shards), threading.Lock(), threading.Lock()
    stop, failed, computing = threading.Event(), list[BaseException](), set[int]()

    def report(tokens: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with reporting:
            advance(tokens)

    def work() -> None:
        torch.set_num_threads(1)  # of this thread
        while True:
            with taking:
                shard = next(waiting, None)
                if shard is None or stop.is_set():
                    return
                computing.add(shard.index)
            try:
                make_shard(target, shard, origin, folder, report)
            finally:
                computing.discard(shard.index)
            with reporting:
                done(shard.index)

    def work_beside() -> None:
        try:
            work()
        except _StoppedError:
            pass
        except BaseException as error:
            failed.append(error)
            stop.set()

    before = torch.get_num_threads()
    try:
        if threads == 1 or not target.takes_threads:
            work()
            return
        running = [threading.Thread(target=work_beside, daemon=True) for _ in range(threads)]
        try:
            for thread in running:
                thread.start()
            while not failed and any(thread.is_alive() for thread in running):
                stop.wait(0.02)
            if failed:
                raise failed[0]
        finally:
            # Each stops at the end of its batch. One that waits for a shard is not waited for.
            stop.set()
            while computing:
                time.sleep(0.01)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def read_features(
    target: Target,
    samples: Sequence[TokenSample],
    features: Callable[[], Tensor],
    signal: TeacherSignal,
) -> list[Features]:
    """One forward pass over `samples`, padded to the longest; `features` gives what open taps caught in it.

    Raises:
        TargetError: the target's hidden states are not finite.
    """
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
    # Padding stands behind the text, so the causal mask alone keeps it out of sight.
    hidden = target.decoder(ids.to(target.device), use_cache=False).last_hidden_state
    tapped = features()
    return [
        features_of(target, sample, tapped[i, : len(sample.input_ids)], hidden[i, : len(sample.input_ids)], signal)
        for i, sample in enumerate(samples)
    ]


def features_of(target: Target, sample: TokenSample, tapped: Tensor, hidden: Tensor, signal: TeacherSignal) -> Features:
    """What is kept of one conversation.

    Args:
        target: for the teacher, its frozen head.
        sample: of seq tokens.
        tapped: [seq, taps], outputs of the layers.
        hidden: [seq, hidden], after the final norm.
        signal: what the teacher is.

    Raises:
        TargetError: the hidden states are not finite.
    """
    mask = torch.tensor(sample.loss_mask, dtype=torch.bool)
    token, teacher = _teacher(target, hidden, mask, signal)
    kept = tapped.cpu()
    # The largest of values of which one is NaN is NaN.
    if not all(float(states.abs().amax()) < math.inf for states in (kept, hidden)):
        raise TargetError(
            f"conversation {sample.id}: hidden states of target {target.spec.name} are not finite in "
            f"{target.spec.dtype}; load it in bfloat16 or float32 (target.dtype), or leave the conversation out"
        )
    return Features(kept, token, teacher, torch.tensor(sample.input_ids), mask)


def _teacher(target: Target, hidden: Tensor, mask: Tensor, signal: TeacherSignal) -> tuple[Tensor, TeacherRows]:
    """The target's argmax at each position, -1 where the next token is not trained, and the teacher where it is."""
    where = taught(mask)
    hidden = hidden[where.to(hidden.device)]
    best, choice, lse = [], [], []
    for rows in hidden.split(LOGIT_ROWS):
        logits = target.frozen_head.logits(rows)
        high, ids = top_k(logits, signal.k) if isinstance(signal, TopKSignal) else row_max(logits)
        best.append(high.cpu())
        choice.append(ids.cpu())
        # Written out: torch.logsumexp makes two more copies of [row, vocab].
        lse.append((high[:, 0] + logits.sub_(high[:, :1]).exp_().sum(-1).log()).cpu())
    tokens, log_sum = torch.cat(choice), torch.cat(lse)
    token = torch.full(mask.shape, -1)
    token[where] = tokens[:, 0]
    if isinstance(signal, TopKSignal):
        return token, TopKTeacher(tokens, (torch.cat(best) - log_sum[:, None]).half())
    return token, HiddenTeacher(hidden.cpu(), log_sum)


def row_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(-1, keepdim=True)`, the first id of equal ones; [row, vocab] -> two of [row, 1].

    On a CPU the maximum without its place is many times faster than with it, so the place is sought only in the block
    of 128 that holds the maximum.
    """
    rows, vocab = logits.shape
    if vocab % 128:
        return logits.max(-1, keepdim=True)
    best, block = logits.unflatten(-1, (-1, 128)).amax(-1).max(-1, keepdim=True)
    within = logits.view(rows, -1, 128)[torch.arange(rows, device=logits.device), block[:, 0]].argmax(-1, keepdim=True)
    return best, block * 128 + within


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their ids, the largest first and equal ones by their ids.

    Logits of a bfloat16 target are often equal: without an order of their own the first of the top k would be another
    token than the argmax at one position in seventy (SmolLM2-135M).
    """
    ids = logits.topk(k, -1, sorted=False).indices.sort(-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
