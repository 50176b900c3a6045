"""Processor, memory and GPUs of this machine, as shares in use. GPUs through NVML, where there is a driver."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil
import pynvml

from sstf.dashboard.alarms import Clock
from sstf.dashboard.tables import History

GIB = 2**30


class MachineWatch:
    """This machine. `poll` measures since the last call; `version` counts the calls."""

    def __init__(self, clock: Clock) -> None:
        self.id, self.name, self.version = "machine", "this machine", 0
        self.history = History()
        self.latest: dict[str, float] = {}
        self._clock = clock
        self.cores = psutil.cpu_count() or 1
        self.memory_gib = psutil.virtual_memory().total / GIB
        self._gpus = _gpus()
        self.gpus = [str(pynvml.nvmlDeviceGetName(gpu)) for gpu in self._gpus]
        psutil.cpu_percent()  # the first call only starts the clock

    def poll(self) -> None:
        """Measure."""
        memory = psutil.virtual_memory()
        self.latest = {"cpu": psutil.cpu_percent() / 100, "memory": 1 - memory.available / memory.total}
        for i, gpu in enumerate(self._gpus):
            with suppress(pynvml.NVMLError):  # a part of a GPU (MIG) tells its memory alone; one may fall off the bus
                held = pynvml.nvmlDeviceGetMemoryInfo(gpu)
                self.latest[f"gpu_memory/{i}"] = held.used / held.total
                self.latest[f"gpu/{i}"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100
        self.history.add(self._clock(), self.latest)
        self.version += 1

    def to_json(self) -> dict[str, Any]:
        """All but the table."""
        return {
            "id": self.id,
            "kind": "machine",
            "name": self.name,
            "cores": self.cores,
            "memory_gib": round(self.memory_gib, 1),
            "gpus": self.gpus,
            "latest": self.latest,
        }


def _gpus() -> list[Any]:
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver, or no NVIDIA GPU
        return []
