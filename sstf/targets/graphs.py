"""Passes of fixed shapes, replayed as CUDA graphs.

A decoding pass on a GPU consists of hundreds of small kernels, and launching them from Python takes longer than
running them. A graph launches them all at once, but only for one shape and for the same memory: so rows and visible
keys are rounded up to a few sizes, and inputs are copied into buffers that stay. On other devices the same passes run
directly, which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
KEYS = 256  # visible keys come in multiples of it

Work = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def padded_rows(rows: int) -> int | None:
    """The next size that has a graph; None where there is none."""
    return next((size for size in ROWS if size >= rows), None)


def padded_keys(keys: int, capacity: int) -> int:
    """Visible keys rounded up, within the cache."""
    return min(-(-keys // KEYS) * KEYS, capacity)


@dataclass
class _Captured:
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    graph: Any  # torch.cuda.CUDAGraph; None where passes run directly


class GraphRunner:
    """Runs functions of fixed shapes; on a GPU each is captured at its first call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None

    def __call__(self, key: Hashable, inputs: dict[str, Tensor], work: Work) -> tuple[Tensor, ...]:
        """Run `work` on `inputs`.

        Args:
            key: names the work and its shapes; the same key promises the same shapes and the same `work`.
            inputs: copied into the buffers that `work` reads.
            work: launches kernels alone: no read-back, no memory that another call replaces.

        Returns:
            What `work` returned; overwritten by the next call with this key.
        """
        known = self._captured.get(key)
        if known is None:
            known = self._captured[key] = self._capture({name: t.clone() for name, t in inputs.items()}, work)
        for name, tensor in inputs.items():
            known.inputs[name].copy_(tensor)
        if known.graph is None:
            known.outputs = work(known.inputs)
        else:
            known.graph.replay()
        return known.outputs

    def _capture(self, inputs: dict[str, Tensor], work: Work) -> _Captured:
        if self.device.type != "cuda":
            return _Captured(inputs, (), None)
        # Warm-up on a stream of its own, as torch asks for: libraries allocate at their first calls.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                work(inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = work(inputs)
        self._pool = graph.pool()
        return _Captured(inputs, outputs, graph)
