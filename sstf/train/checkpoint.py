"""Training checkpoints: head, optimiser state, averaged weights and step, each folder whole or absent.

The tensors are whole (never one process's shard) and named, so a run may go on with another number of processes or
another way of sharding. Everything else that it needs (data order, learning rate, random numbers) is a function of the
seed and the step. No pickle: safetensors and JSON only, every file under a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from sstf.data.atomic import sync_folder, write_json_atomic
from sstf.errors import ConfigError, DamagedDataError

PARTS = ("head", "optimizer", "average")
# What heads and optimisers hold, in safetensors' names.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}


@dataclass
class Progress:
    """Where a run stands.

    `best` is the highest accepted length so far, reached at `best_step`; `declining` counts the choices since then.
    `skipped` counts steps without a supervised token. `batch_tokens` and `loss_rows` are what was computed at once.
    """

    step: int = 0
    best: float = 0.0
    best_step: int = -1
    declining: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    batch_tokens: int | None = None
    loss_rows: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`origin` says what is trained on what; `optimizer` has `<state>.<parameter name>`, `average` may be empty."""

    progress: Progress
    origin: dict[str, Any]
    head: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `folder/step-<n>` and drop all but the `keep` latest."""
    final = folder / f"step-{checkpoint.progress.step:08d}"
    scratch = folder / f".{final.name}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    digests = {}
    for part in PARTS:
        tensors: dict[str, Tensor] = getattr(checkpoint, part)
        digests[part] = write_tensors(scratch / f"{part}.safetensors", tensors)
    content = {"progress": asdict(checkpoint.progress), "origin": checkpoint.origin, "sha256": digests}
    write_json_atomic(scratch / "progress.json", content | {"own_sha256": _digest(content)})
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    sync_folder(folder)  # before an older one goes
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, one tensor after the other, and return its sha256.

    safetensors' own `save` makes two copies of all tensors first, for which a training would need more memory than for
    its steps.
    """
    # The widest numbers first, so that all of them are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def read_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote.

    Raises:
        DamagedDataError: a file is missing, cut off or altered.
    """
    try:
        content = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        digest = content.pop("own_sha256")
        if digest != _digest(content):
            raise _altered(path, "progress.json")
        tensors = {}
        for part in PARTS:
            data = (path / f"{part}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != content["sha256"][part]:
                raise _altered(path, f"{part}.safetensors")
            tensors[part] = load(data)
        return Checkpoint(Progress(**content["progress"]), content["origin"], **tensors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedDataError(
            f"{path}: unreadable checkpoint ({error}); delete it to go on from an earlier one"
        ) from error


def check_origin(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """A checkpoint goes on only with what it began with.

    Raises:
        ConfigError: another method, other data or another order of it.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{path} was written with {name} {json.dumps(found.get(name))}, this run has {json.dumps(value)}; give "
                "it that, or start in another folder (train.warm_start takes the weights alone)"
            )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _altered(path: Path, file: str) -> DamagedDataError:
    return DamagedDataError(
        f"{path / file}: altered or cut off (its checksum differs); delete {path} to go on from an earlier checkpoint"
    )
