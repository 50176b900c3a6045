"""Shards made by Ray's actors, on this machine or on a cluster that shares the run's folder."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sstf.errors import ConfigError, DamagedDataError, SstfError, TargetError, WorkerError
from sstf.features.engines import RayEngine
from sstf.features.shards import Shard, make_shards
from sstf.features.store import Origin
from sstf.features.worker import Job, open_target
from sstf.targets import Target, TargetConfig
from sstf.types import TokenSample

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ShardActor:
    """Ray starts it once a worker: the target is loaded with its first shards, and stays."""

    def __init__(self, job: str) -> None:
        self._job = Job.from_json(json.loads(job))
        self._target: Target | None = None

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Make the shards of a batch of rows; one row of tokens done and, where it went wrong, the reason."""
        shards = [
            Shard(int(index), [TokenSample(**sample) for sample in json.loads(samples)])
            for index, samples in zip(batch["index"], batch["samples"], strict=True)
        ]
        job, error, code = self._job, "", 0
        try:
            if self._target is None:
                self._target = open_target(job)
            make_shards(self._target, shards, job.origin, job.folder, job.threads, lambda tokens: None)
        except SstfError as raised:
            error, code = str(raised), raised.exit_code
        return {
            "tokens": np.array([sum(shard.tokens for shard in shards)]),
            "error": np.array([error]),
            "code": np.array([code]),
        }


def make_in_actors(
    todo: Sequence[Shard],
    target: TargetConfig,
    origin: Origin,
    folder: Path,
    workers: int,
    engine: RayEngine,
    advance: Callable[[int], None],
) -> None:
    """Make the shards `todo` in up to `workers` actors.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at that address.
        TargetError, DamagedDataError: what went wrong in an actor.
        WorkerError: an actor ended before its work did; Ray has tried again where that could help.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError(
            'extract.engine.kind is ray, which is not installed; run `pip install "sstf[ray]"`, on every machine'
        ) from None
    started = not ray.is_initialized()
    if started:
        try:
            _reach(engine.address)
            ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at extract.engine.address={engine.address} ({error}); start one with `ray "
                "start --head`, or leave the address out to use this machine"
            ) from None
    try:
        resources: dict[str, float] = ray.cluster_resources()
        gpus = engine.gpus if resources.get("GPU") else 0
        cores = int(resources["CPU"])
        workers = min(workers, len(todo), int(resources["GPU"] / gpus) if gpus else cores)
        threads = 1 if gpus else cores // workers
        job = Job(target, origin, folder.absolute(), threads)
        rows = [
            {"index": shard.index, "samples": json.dumps([asdict(sample) for sample in shard.samples])}
            for shard in todo
        ]
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardActor,
            fn_constructor_args=(json.dumps(job.to_json()),),
            batch_size=threads,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if gpus else threads,
            num_gpus=gpus,
        )
        for row in made.iter_rows():
            if row["code"]:
                raise (DamagedDataError if row["code"] == 3 else TargetError)(row["error"])
            advance(int(row["tokens"]))
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"a Ray actor failed ({str(error).strip().splitlines()[-1][:300]}); finished shards are kept: run the "
            "command again"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Ray itself tries for minutes.

    Raises:
        OSError: nothing listens there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
