"""What the machine is and offers: processor and GPUs, free disk, and memory of the device that a run will use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """What a figure was measured on. `cores` are those that this process may use, `memory_gib` is the machine's."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": gpus[0] if gpus else None,
        "gpus": len(gpus),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be made."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU; of a CPU, what is available without swapping, within the limit of the process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    available = _figure(Path("/proc/meminfo"), "MemAvailable:")
    if available is not None:
        found.append(available * 1024)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()))
    return min(found)


def memory_left(device: torch.device) -> int:
    """Bytes that processes may still take: of a GPU, with what torch keeps free there; of a CPU, without swapping and
    within the limit of the process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _figure(Path("/proc/meminfo"), "MemAvailable:")
    left = device_memory(device) if available is None else available * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        kept = _figure(group / "memory.stat", "inactive_file ") or 0  # of files; given up for whoever needs it
        left = min(left, int(limit.read_text()) - int(used.read_text()) + kept)
    return max(0, left)


def resident_memory() -> int:
    """Bytes that this process holds: Python and its libraries, before a target is loaded. 0 where it is not known."""
    held = _figure(Path("/proc/self/status"), "VmRSS:")
    return 0 if held is None else held * 1024


def memory_in_use() -> int:
    """Bytes that training holds now: of the GPU what torch has reserved, otherwise what this process has resident."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else resident_memory()


def _figure(file: Path, name: str) -> int | None:
    if not file.is_file():
        return None
    lines = [line for line in file.read_text().splitlines() if line.startswith(name)]
    return int(lines[0].split()[1]) if lines else None
