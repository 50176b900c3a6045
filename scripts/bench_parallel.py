"""Memory of a process under each way of sharing a head, in units of the head's float32 weights.

    python scripts/bench_parallel.py
    accelerate launch --config_file configs/accelerate/cpu-2-fsdp2.yaml --num_processes 4 scripts/bench_parallel.py

Activations are next to nothing here, so what is counted are weights, gradients, moments, and the buffers in which they
cross processes. Prints one JSON line: resident memory between steps, and its peak in a step. For CPUs only; start it
with MALLOC_MMAP_THRESHOLD_=65536, or freed tensors stay in the allocator's pools and are counted.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sstf.heap import trim
from sstf.train.optim import AdamWConfig, build_optimizers
from sstf.train.parallel import close_launch, open_launch, open_parallel
from sstf.types import StepOutput

MATRICES, WIDTH = 16, 2048  # 67 million weights
MICRO_BATCHES = 2
WARM, MEASURED = 3, 3  # steps; the first ones make moments and buffers


class Matrices(nn.Module):
    """Stands for `HeadWithLoss`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MATRICES))

    def forward(self, x: torch.Tensor) -> StepOutput:
        for layer in self.head:
            x = x + layer(x)
        none = torch.zeros(1)
        return StepOutput(x.square().mean(), none, none, none, none, torch.zeros(1, 0, dtype=torch.bool))


def memory(which: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def main() -> None:
    torch.set_num_threads(1)
    launch = open_launch()
    if launch.kind.startswith("zero") and importlib.util.find_spec("deepspeed"):
        import deepspeed  # noqa: F401  # its code is not what is measured
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    trim()
    before = memory("VmRSS")
    module: Any = Matrices()
    unit = sum(p.numel() for p in module.parameters()) * 4
    parallel = open_parallel(launch, module, lambda named: build_optimizers(AdamWConfig(), named))
    batch: Any = x
    for step in range(WARM + MEASURED):
        if step == WARM:
            trim()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for i in range(MICRO_BATCHES):
            parallel.backward(batch, i + 1 == MICRO_BATCHES)
        parallel.step(1.0, 1.0)
    peak = memory("VmHWM")
    trim()
    if launch.is_main:
        figures = {"between_steps": (memory("VmRSS") - before) / unit, "peak": (peak - before) / unit}
        print(json.dumps(launch.facts() | {name: round(value, 2) for name, value in figures.items()}))
    close_launch()


if __name__ == "__main__":
    main()
