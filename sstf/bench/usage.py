"""What a local server's processes use while it is asked: cores, memory, and GPUs where there are any.

CPU time is that of the process and all that it started, from its own counters; memory is their resident sets, shared
pages counted once for each, once a second at its highest. A GPU's use is NVML's, over all processes on it; its memory
is that of the server's own. What other processes use is measured too: on a busy machine, latencies are theirs as well.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import psutil

from sstf.errors import ConfigError

SAMPLE_S = 1.0


@dataclass(frozen=True)
class Usage:
    """Over the seconds in which the server was asked. `gpu_busy` is 0 to 1, None without a GPU."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    others_cpu_s: float = 0.0  # of all that is neither the server nor this process
    peak_bytes: int = 0
    gpu_busy: float | None = None
    gpu_bytes: int | None = None

    @property
    def cores(self) -> float:
        """Busy on average."""
        return self.cpu_s / self.wall_s if self.wall_s else 0.0

    @property
    def others_cores(self) -> float:
        """Busy with other processes on average."""
        return self.others_cpu_s / self.wall_s if self.wall_s else 0.0

    def plus(self, other: Usage) -> Usage:
        """Both spans together."""
        wall = self.wall_s + other.wall_s
        busy = [(u.gpu_busy, u.wall_s) for u in (self, other) if u.gpu_busy is not None]
        held = [u.gpu_bytes for u in (self, other) if u.gpu_bytes is not None]
        weight = sum(seconds for _, seconds in busy)
        return Usage(
            wall,
            self.cpu_s + other.cpu_s,
            self.others_cpu_s + other.others_cpu_s,
            max(self.peak_bytes, other.peak_bytes),
            sum(share * seconds for share, seconds in busy) / weight if weight else None,
            max(held, default=None),
        )

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**vars(self), "cores": self.cores, "others_cores": self.others_cores}


class Watch:
    """Over a process and what it started; `start` and `stop` enclose a span.

    Raises:
        ConfigError: there is no such process.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._process = psutil.Process(pid)
        except psutil.Error:
            raise ConfigError(f"there is no process {pid}; give the number of the server's own") from None
        self._own, self._nvml = psutil.Process(), _nvml()

    def start(self) -> None:
        """Begin a span."""
        self._family = self._processes()
        self._cpu_s = {process: _cpu_s(process) for process in self._family}
        self._outside_s = _machine_cpu_s() - _cpu_s(self._own)
        self._began, self._peak, self._gpu = time.perf_counter(), 0, GpuSamples()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="usage", daemon=True)
        self._thread.start()

    def stop(self) -> Usage:
        """End the span."""
        self._end.set()
        self._thread.join()
        wall = time.perf_counter() - self._began
        # A process that ended meanwhile leaves its last known time; one that began has used none before.
        cpu = sum(max(0.0, _cpu_s(process) - self._cpu_s.get(process, 0.0)) for process in self._processes())
        others = max(0.0, _machine_cpu_s() - _cpu_s(self._own) - self._outside_s - cpu)
        return Usage(wall, cpu, others, self._peak, self._gpu.busy, self._gpu.held)

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, sum(map(_resident, self._family)))
            if self._nvml:
                self._gpu.add(self._nvml, {process.pid for process in self._family})
            if self._end.wait(SAMPLE_S):
                return


class GpuSamples:
    """Of the GPUs on which the watched processes hold memory."""

    def __init__(self) -> None:
        self._busy: list[float] = []
        self.held: int | None = None

    @property
    def busy(self) -> float | None:
        """Mean share of the time in which they computed; None without a GPU."""
        return sum(self._busy) / len(self._busy) if self._busy else None

    def add(self, nvml: ModuleType, pids: set[int]) -> None:
        """One sample."""
        with suppress(nvml.NVMLError):
            shares, held = [], 0
            for index in range(nvml.nvmlDeviceGetCount()):
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(device) if p.pid in pids]
                if mine:
                    shares.append(nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
                    held += sum(process.usedGpuMemory or 0 for process in mine)
            if shares:
                self._busy.append(sum(shares) / len(shares))
                self.held = max(self.held or 0, held)


def _nvml() -> ModuleType | None:
    """NVML, if there is a driver to talk to."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    module: ModuleType = pynvml
    return module


def _cpu_s(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _machine_cpu_s() -> float:
    # A guest's time is in its user's as well.
    times = psutil.cpu_times()._asdict()
    return float(sum(times[name] for name in times.keys() - {"idle", "iowait", "guest", "guest_nice"}))


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def listening(url: str) -> int | None:
    """The process that listens on a local address's port; None if it is elsewhere, or another user's."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return int(connection.pid)
    return None
