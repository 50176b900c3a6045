"""One of several workers: loads the target, and makes the shards that it is handed.

As a process (`python -m sstf.features.worker`) it is spoken to in JSON lines, see `child_process`: first the job, then
shards `{"index": n, "samples": [...]}`, until its input ends. It answers `{"ready": true}`, `{"tokens": n}` now and
then, `{"done": n}` for each shard, or `{"error": ..., "exit_code": ...}`. Ray's actors use `Job` and `open_target`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstf.errors import SstfError, TargetError
from sstf.features.shards import Shard, make_shards
from sstf.features.store import Origin
from sstf.targets import Target, TargetConfig, load_configured
from sstf.types import TokenSample


@dataclass(frozen=True)
class Job:
    """What every worker is told. `threads` make shards at once, in a worker that computes on a CPU."""

    target: TargetConfig
    origin: Origin
    folder: Path
    threads: int

    def to_json(self) -> dict[str, Any]:
        """For the worker's first line."""
        return {
            "target": self.target.model_dump(mode="json"),
            "origin": self.origin.to_json(),
            "folder": str(self.folder),
            "threads": self.threads,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Job:
        """Inverse of `to_json`."""
        return Job(
            TargetConfig.model_validate(fields["target"]),
            Origin.from_json(fields["origin"]),
            Path(fields["folder"]),
            fields["threads"],
        )


def open_target(job: Job) -> Target:
    """Load the job's target.

    Raises:
        TargetError: it cannot be loaded, or is not the one that the store is made from.
    """
    target = load_configured(job.target)
    if target.spec != job.origin.target:
        raise TargetError(
            f"a worker loaded target {target.spec.name} ({target.spec.fingerprint}), the store is made from "
            f"{job.origin.target.name} ({job.origin.target.fingerprint}); the target's files changed meanwhile, or "
            "differ between the machines"
        )
    return target


def main() -> None:
    """Until the input ends."""
    # Only answers may go where the answers are read.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    writing = threading.Lock()

    def answer(value: dict[str, Any]) -> None:
        with writing:
            print(json.dumps(value), file=answers, flush=True)

    def requested() -> Iterator[Shard]:
        for line in sys.stdin:
            request = json.loads(line)
            yield Shard(request["index"], [TokenSample(**sample) for sample in request["samples"]])

    try:
        job = Job.from_json(json.loads(sys.stdin.readline()))
        target = open_target(job)
        answer({"ready": True})
        make_shards(
            target,
            requested(),
            job.origin,
            job.folder,
            job.threads,
            lambda tokens: answer({"tokens": tokens}),
            lambda index: answer({"done": index}),
        )
    except SstfError as error:
        answer({"error": str(error), "exit_code": error.exit_code})
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        answer({"full": True})
    answers.flush()
    os._exit(0)  # threads that wait for more to do are not waited for


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
