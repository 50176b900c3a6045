"""Shards made by several processes of this machine. What decides a shard's bytes is not who makes it."""

from __future__ import annotations

import errno
import os
import queue
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sstf.child_process import ChildProcess
from sstf.errors import DamagedDataError, TargetError, WorkerError
from sstf.features.shards import Shard, threads_for
from sstf.features.store import Origin
from sstf.features.worker import Job
from sstf.targets import TargetConfig


def make_in_processes(
    todo: Sequence[Shard],
    target: TargetConfig,
    origin: Origin,
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """Make the shards `todo` in up to `workers` processes. Worker i takes GPU i where there are GPUs; otherwise they
    share the cores.

    Raises:
        WorkerError: a worker ended before its work did.
        TargetError, DamagedDataError, OSError: what went wrong in a worker.
    """
    workers = min(workers, len(todo))
    waiting = deque(todo)
    left = len(todo)
    answers: queue.Queue[tuple[ChildProcess, dict[str, Any] | None]] = queue.Queue()
    with ExitStack() as stack:
        for i in range(workers):
            own = _device_of(i, target)
            job = Job(own, origin, folder, threads_for("cpu" if own.device == "cpu" else "cuda", workers))
            command = [sys.executable, "-m", "sstf.features.worker"]
            # Each thread of a worker computes on one core.
            child = ChildProcess(command, f"extraction worker {i + 1} of {workers}", answers, {"OMP_NUM_THREADS": "1"})
            stack.callback(_remove_leftovers, folder, child.pid)  # once it has ended
            stack.enter_context(child)
            child.send(job.to_json())
            for _ in range(job.threads):
                _hand_out(waiting, child)
        while left:
            child, answer = answers.get()
            if answer is None:
                raise WorkerError(
                    f"{child.name} {child.how_it_ended()}; finished shards are kept: run the command again, with fewer "
                    "extract.workers or a smaller extract.batch_tokens if memory was short"
                )
            if "error" in answer:
                raise (DamagedDataError if answer["exit_code"] == 3 else TargetError)(answer["error"])
            if "full" in answer:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            advance(answer.get("tokens", 0))
            if "done" in answer:
                left -= 1
                _hand_out(waiting, child)


def _remove_leftovers(folder: Path, pid: int) -> None:
    """Of a worker that was killed while it wrote."""
    for leftover in folder.glob(f".*.{pid}.tmp"):
        leftover.unlink(missing_ok=True)


def _hand_out(waiting: deque[Shard], child: ChildProcess) -> None:
    if waiting:
        shard = waiting.popleft()
        child.send({"index": shard.index, "samples": [asdict(sample) for sample in shard.samples]})


def _device_of(worker: int, target: TargetConfig) -> TargetConfig:
    if target.device != "auto":
        return target
    device = f"cuda:{worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return target.model_copy(update={"device": device})
