from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from sstf.dashboard.machine_use import MachineWatch


def test_shares_of_this_machine() -> None:
    machine = MachineWatch(lambda: 100.0)
    machine.poll()
    assert 0 <= machine.latest["cpu"] <= 1 and 0 < machine.latest["memory"] < 1
    assert machine.history.windows[900].rows()[0][0] == 100


def test_gpus_and_one_that_tells_only_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's functions stand in for a driver, which test machines lack."""

    def busy(gpu: int) -> SimpleNamespace:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=75)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda i: f"card {i}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda i: SimpleNamespace(used=1, total=4))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", busy)
    machine = MachineWatch(lambda: 100.0)
    machine.poll()
    gpus = {name: value for name, value in machine.latest.items() if name.startswith("gpu")}
    assert gpus == {"gpu/0": 0.75, "gpu_memory/0": 0.25, "gpu_memory/1": 0.25}
    assert machine.to_json()["gpus"] == ["card 0", "card 1"]
