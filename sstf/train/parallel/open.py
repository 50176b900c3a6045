"""From what was launched to the implementation that does it."""

from __future__ import annotations

from collections.abc import Callable

from sstf.train.module import HeadWithLoss
from sstf.train.parallel.base import MakeOptimizers, Parallel
from sstf.train.parallel.launch import Kind, Launch
from sstf.train.parallel.native import Ddp, Fsdp2, Native
from sstf.train.parallel.zero import Zero

KINDS: dict[Kind, Callable[[Launch, HeadWithLoss, MakeOptimizers], Parallel]] = {
    "single": Native,
    "ddp": Ddp,
    "fsdp2": Fsdp2,
    "zero1": Zero,
    "zero2": Zero,
    "zero3": Zero,
}


def open_parallel(launch: Launch, module: HeadWithLoss, make_optimizers: MakeOptimizers) -> Parallel:
    """Share a head among the processes of a launch.

    Args:
        launch: From `open_launch`.
        module: The head and its objective, on `launch.device` and with the same weights in every process.
        make_optimizers: Called once, with the head's trained parameters in the form in which this process holds them,
            by their names in the head. Every group needs a `peak_lr`. FSDP2 and ZeRO take one AdamW.

    Raises:
        ConfigError: the optimisers do not fit the kind, or DeepSpeed is not installed.
    """
    return KINDS[launch.kind](launch, module, make_optimizers)
