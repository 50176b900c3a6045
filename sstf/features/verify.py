"""A finished store, checked byte by byte: what is wrong with it, all of it and not only the first thing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sstf.data.progress import Progress, Task
from sstf.errors import DamagedDataError
from sstf.features.record import Features
from sstf.features.store import (
    FROZEN,
    MANIFEST,
    Manifest,
    Shard,
    ShardInfo,
    again,
    read_description,
    read_manifest,
    sha256_of,
)
from sstf.targets import FrozenHead
from sstf.types import HiddenTeacher, TokenSample


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one file, and how to repair it."""

    file: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what is wrong with it."""

    folder: str
    files: int
    size: int  # bytes
    conversations: int
    tokens: int
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(
    folder: Path, progress: Progress, samples: Sequence[TokenSample] | None = None, beside: Collection[str] = ()
) -> VerifyReport:
    """Check every byte of a store, and that what the bytes say makes sense.

    Checksums and sizes of all files, the manifest against the shards and their descriptions, every row of every
    conversation (that it can be read, is finite, and names tokens that exist), and that no other file lies there.

    Args:
        folder: of the store.
        progress: shows the tokens done.
        samples: the conversations that the store should hold, in order; None leaves that out.
        beside: names of files that others keep in the folder.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in beside)
    faults: list[Fault] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(folder)
        shards = manifest.shards
    except DamagedDataError as error:
        faults.append(Fault(MANIFEST, str(error)))
        shards, unreadable = _described(folder)
        faults += unreadable
    names = {MANIFEST, FROZEN, *(shard.file for shard in shards), *(_description(shard) for shard in shards)}
    faults += [
        Fault(str(file.relative_to(folder)), f"{file} does not belong to the store; delete it")
        for file in files
        if str(file.relative_to(folder)) not in names | {fault.file for fault in faults}
    ]
    with progress.start("verify", sum(sum(shard.lengths) for shard in shards), "tokens") as bar:
        first = 0
        for shard in shards:
            expected = samples[first : first + len(shard.ids)] if samples is not None else None
            faults += _shard_faults(folder, shard, manifest, expected, bar)
            first += len(shard.ids)
    if samples is not None and len(samples) != first:
        faults.append(
            Fault(MANIFEST, f"{folder} holds {first} conversations, the data {len(samples)}; {again(folder)}")
        )
    if manifest:
        faults += _frozen_faults(folder, manifest)
    size = sum(file.stat().st_size for file in files)
    return VerifyReport(str(folder), len(files), size, first, sum(sum(s.lengths) for s in shards), tuple(faults))


def _description(shard: ShardInfo) -> str:
    return Path(shard.file).with_suffix(".json").name


def _described(folder: Path) -> tuple[list[ShardInfo], list[Fault]]:
    """The shards by their own descriptions, where the manifest cannot be read."""
    shards, faults = [], []
    for path in sorted(folder.glob("shard-*.json")):
        try:
            shards.append(read_description(path)[0])
        except DamagedDataError as error:
            faults.append(Fault(path.name, str(error)))
    return shards, faults


def _shard_faults(
    folder: Path, info: ShardInfo, manifest: Manifest | None, samples: Sequence[TokenSample] | None, bar: Task
) -> Iterator[Fault]:
    path = folder / _description(info)
    try:
        described, made_from = read_description(path)
        if manifest and (described, made_from) != (info, manifest.origin.summary()):
            yield Fault(path.name, f"{path} and the manifest contradict each other; {again(folder)}")
    except DamagedDataError as error:
        yield Fault(path.name, str(error))
    try:
        shard = Shard(folder, info, manifest.origin.compression if manifest else "none")
    except DamagedDataError as error:
        yield Fault(info.file, str(error))
        return
    if not manifest:  # without it nobody knows what the shard's tensors should be
        return
    record = manifest.origin.record()
    expected = {f"{i}.{name}" for i in range(len(info.ids)) for name in record.a_token | record.a_row}
    if stray := sorted(shard.names() - expected):
        yield Fault(info.file, f"{shard.path} holds {stray[0]}, which no conversation has; {again(shard.path)}")
    for i, name in enumerate(info.ids):
        try:
            row = shard.conversation(i, record)
        except DamagedDataError as error:
            yield Fault(info.file, str(error))
            return  # whoever wrote one conversation wrong did not do better with the next
        wrong = _wrong(row, info.trained[i], manifest.origin.target.vocab_size)
        if samples and i < len(samples):
            wrong = wrong or _differs(row, name, samples[i])
        if wrong:
            yield Fault(info.file, f"{shard.path}: conversation {name} {wrong}; {again(shard.path)}")
        bar.advance(info.lengths[i])


def _wrong(row: Features, trained: int, vocab: int) -> str | None:
    """What is wrong with the rows of a conversation that could be read."""
    teacher = row.teacher
    if isinstance(teacher, HiddenTeacher):
        values = {"features": row.features, "last hidden states": teacher.hidden, "log-sum-exp": teacher.lse}
        tokens = row.teacher_token[row.teacher_token >= 0]
    else:
        values = {"features": row.features, "log-probabilities": teacher.log_probs}
        tokens = teacher.tokens
    for name, tensor in values.items():
        if not bool(tensor.isfinite().all()):
            return f"has {name} that are not finite"
    if int(row.loss_mask.sum()) != trained:
        return f"has {int(row.loss_mask.sum())} trained tokens, the manifest says {trained}"
    for name, ids in {"tokens": row.input_ids, "teacher tokens": tokens}.items():
        if not _within(ids, vocab):
            return f"has {name} outside the target's vocabulary of {vocab}"
    return None


def _within(ids: Tensor, vocab: int) -> bool:
    return bool(((ids >= 0) & (ids < vocab)).all())


def _differs(row: Features, name: str, sample: TokenSample) -> str | None:
    if name != sample.id:
        return f"stands where the data has {sample.id}"
    if row.input_ids.tolist() != sample.input_ids or row.loss_mask.tolist() != sample.loss_mask:
        return "has other tokens or another loss mask than the data"
    return None


def _frozen_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    path = folder / FROZEN
    if not path.exists() or sha256_of(path) != manifest.frozen_sha256:
        yield Fault(FROZEN, f"{path} is missing or altered; {again(path)}")
        return
    try:
        FrozenHead.load(path)
    except DamagedDataError as error:
        yield Fault(FROZEN, str(error))
