"""What a launcher asked for, and what started.

`accelerate launch --config_file ...` tells its processes through the environment what to be: WORLD_SIZE, RANK,
LOCAL_RANK and MASTER_ADDR as torchrun does, ACCELERATE_USE_FSDP or ACCELERATE_USE_DEEPSPEED for the way to share. This
file is the only reader of that environment. The processes are joined by torch itself and not by accelerate's
`Accelerator`, which on CPUs makes DDP of FSDP2, or a single process of several, and says nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from sstf.errors import ConfigError

# How long processes wait for one another: the main one may decode for real, or write a large checkpoint.
PATIENCE = timedelta(hours=1)

Kind = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Launch:
    """This process among all that train together, checked against what was asked for."""

    kind: Kind
    processes: int
    rank: int
    device: torch.device
    backend: str | None  # of torch.distributed; None in a single process
    machines: int
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's `zero_optimization` section

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def facts(self) -> dict[str, Any]:
        """What actually started, for the log."""
        return {
            "kind": self.kind,
            "processes": self.processes,
            "machines": self.machines,
            "backend": self.backend,
            "device": self.device.type,
        }

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, a new tensor on this process's device. Collective."""
        total = tensor.detach().to(self.device, copy=True)
        if self.backend:
            dist.all_reduce(total)
        return total

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main process's tensor, a new one on this process's device; shapes and dtypes must agree. Collective."""
        copy = tensor.detach().to(self.device, copy=True)
        if self.backend:
            dist.broadcast(copy, src=0)
        return copy

    def wait(self) -> None:
        """Until every process is here. Collective."""
        if self.backend:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def open_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Join the processes that the launcher started; again in the same process, the same.

    Args:
        environment: The launcher's; this process's unless given.

    Raises:
        ConfigError: what was asked for is unknown or did not start, or there are more processes than GPUs.
    """
    env = os.environ if environment is None else environment
    processes, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    kind, zero = asked_kind(env)
    if kind != "single" and "WORLD_SIZE" not in env:
        raise ConfigError(
            f"the launcher asked for {kind} but started this process alone; give it an accelerate configuration such "
            "as configs/accelerate/cpu-2-fsdp2.yaml, without --cpu"
        )
    device = _device(int(env.get("LOCAL_RANK", "0")))
    if kind == "single":
        return Launch(kind, 1, 0, device, None, 1)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if (dist.get_world_size(), dist.get_rank()) != (processes, rank):
        raise ConfigError(
            f"the launcher started {processes} processes but {dist.get_world_size()} joined; start them with one "
            "`accelerate launch` on each machine"
        )
    machines = int(env.get("GROUP_WORLD_SIZE", "1"))
    return Launch(kind, processes, rank, device, dist.get_backend(), machines, zero)


def close_launch() -> None:
    """Leave together: a process that leaves early takes the connections of the others with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def asked_kind(env: Mapping[str, str]) -> tuple[Kind, dict[str, Any]]:
    """How the processes are to share the head, and DeepSpeed's `zero_optimization` section.

    Raises:
        ConfigError: accelerate was configured for something that is not built here.
    """
    if _on(env, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(env)
    if _on(env, "ACCELERATE_USE_FSDP"):
        if env.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("accelerate's fsdp_config asks for FSDP 1; set fsdp_version: 2")
        for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
            if _on(env, name):
                key = f"fsdp_{name.removeprefix('FSDP_').lower()}"
                raise ConfigError(f"accelerate's fsdp_config sets {key}, which a draft head has no use for; remove it")
        return "fsdp2", {}
    return ("ddp" if int(env.get("WORLD_SIZE", "1")) > 1 else "single"), {}


def _zero(env: Mapping[str, str]) -> tuple[Kind, dict[str, Any]]:
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not file or file == "none":
        raise ConfigError(
            "accelerate asks for DeepSpeed without a deepspeed_config_file; name one, such as configs/deepspeed/"
            "zero2.json"
        )
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: DeepSpeed's configuration cannot be read ({error}); a relative path starts in the folder you "
            "launch from"
        ) from error
    others = sorted(config.keys() - {"zero_optimization"})
    if others:
        raise ConfigError(
            f"{file} sets {', '.join(others)}, which the run's configuration decides; keep zero_optimization only"
        )
    zero = config.get("zero_optimization", {})
    kind = f"zero{zero.get('stage')}"
    if kind not in get_args(Kind):
        raise ConfigError(f"{file}: zero_optimization.stage is {zero.get('stage')}; expected 1, 2 or 3")
    offload = sorted(key for key in zero if key.startswith("offload_"))
    if offload:
        raise ConfigError(f"{file} sets {', '.join(offload)}, which a draft head is too small for; remove it")
    return kind, zero  # type: ignore[return-value]


def _on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "false").lower() in ("true", "1", "yes")


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; start "
            "one process a GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    return torch.device("cuda", local_rank)
