"""Whether a head may go out: checks of the folder as others will get it, each a list of named verdicts.

A check is a function of the `Candidate`. `CHECKS` holds those that every publication passes through, the quickest
first; a failed verdict stops it, unless it is forced, and the card tells the verdicts either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from sstf.data.progress import Progress
from sstf.doctor import check_head
from sstf.errors import SstfError
from sstf.formats import Engine, read_any
from sstf.methods.checkpoint import StoredHead, load_head, read_head
from sstf.parity.ladder import ParitySettings, climb, training_precision
from sstf.targets import Target


@dataclass(frozen=True)
class Verdict:
    """What one check found. `detail` is a short text: what was measured, or what is wrong."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Candidate:
    """What is to go out: the folder, made from the head in `source`, for `target`."""

    folder: Path
    source: Path
    target: Target


Check = Callable[[Candidate, Progress], list[Verdict]]


def read_back(candidate: Candidate, progress: Progress) -> list[Verdict]:
    """The head and its exports, read as their users will read them, are one head.

    Raises:
        SstfError: the head itself cannot be read, or is another target's.
    """
    folder, target = candidate.folder, candidate.target
    load_head(folder, target)
    stored = read_head(folder)
    verdicts = [Verdict("head", True, f"whole, and made for {target.spec.name} ({target.spec.fingerprint})")]
    for engine in get_args(Engine):
        if (folder / engine).is_dir():
            fault = _fault(folder / engine, stored)
            verdicts.append(
                Verdict(f"form for {engine}", fault is None, fault or "read back: layers and tensors agree")
            )
    return verdicts


def _fault(export: Path, stored: StoredHead) -> str | None:
    """How an export differs from the head but for its precision; None if it does not."""
    try:
        read = read_any(export, stored.target)
    except SstfError as error:
        return str(error)
    if read.layers != stored.layers:
        return f"reads the layers {list(read.layers)}, the head {list(stored.layers)}"
    for name, tensor in stored.tensors.items():
        found = read.tensors.get(name)
        if found is None:
            return f"{name} is missing"
        # Exports are in bfloat16.
        if not torch.equal(found, tensor.bfloat16().to(found.dtype) if tensor.is_floating_point() else tensor):
            return f"{name} differs from the head's"
    return None


def doctor(candidate: Candidate, progress: Progress) -> list[Verdict]:
    """What `sstf doctor` finds; a warning passes, and says that it is one."""
    return [
        Verdict(
            f"doctor: {check.name}",
            check.verdict != "fail",
            check.measured if check.verdict in ("pass", "fail") else f"{check.verdict}: {check.measured}",
        )
        for check in check_head(candidate.folder, candidate.target, progress)
    ]


def parity(candidate: Candidate, progress: Progress) -> list[Verdict]:
    """The rungs of `sstf parity` that need no engine."""
    precision = training_precision(candidate.source)
    ladder = climb(candidate.folder, candidate.target, ParitySettings(), precision, progress)
    verdicts = []
    for rung in ladder.rungs:
        length = "" if rung.accepted_length is None else f"accepted length {rung.accepted_length:.2f}"
        verdicts.append(Verdict(f"parity: {rung.name}", not rung.faults, "; ".join(rung.faults) or length))
    return verdicts


CHECKS: tuple[Check, ...] = (read_back, doctor, parity)
