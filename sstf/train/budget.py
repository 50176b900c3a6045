"""How much one process computes at once: chosen before training so that it fits in memory.

The formula is `memory`'s. What a step is does not depend on any of this (`plan`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sstf.errors import ConfigError
from sstf.machine import memory_left
from sstf.train.config import TrainConfig
from sstf.train.memory import Trained, peak_parts
from sstf.train.parallel import Launch

MARGIN = 0.1  # of what is free, left free
USEFUL_ON_CPU = 2048  # tokens; see `choose`
LEAST_LOSS_ROWS = 32
GRAIN = 128  # tokens between the micro-batches that are tried
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """What a process computes at once."""

    rows: int  # of a micro-batch: its tokens
    loss_rows: int  # of draft logits, over all steps of test-time training


@dataclass(frozen=True)
class Budget:
    """The sizes of one training and what they are expected to take, in bytes, on top of what was held before."""

    sizes: Sizes
    need: float
    free: float  # the least of all processes

    def __str__(self) -> str:
        return (
            f"memory: about {self.need / GIB:,.2f} GiB of {self.free / GIB:,.1f} free, in micro-batches of up to "
            f"{self.sizes.rows:,} tokens and loss chunks of {self.sizes.loss_rows} rows"
        )


def free_memory(launch: Launch) -> float:
    """Bytes that each process may take now, beside the others on its machine: the least of them. Collective."""
    beside = 1 if launch.device.type == "cuda" else max(1, launch.processes // launch.machines)
    each = torch.zeros(launch.processes, dtype=torch.float64)
    each[launch.rank] = memory_left(launch.device) / beside
    return float(launch.reduce(each).min())


def need(what: Trained, sizes: Sizes) -> float:
    """Bytes at the peak."""
    return sum(part.bytes for part in peak_parts(what, sizes.rows, sizes.loss_rows))


def choose(
    what: Trained, longest: int, config: TrainConfig, loss_rows: int, free: float, most: int | None = None
) -> Budget:
    """The largest micro-batch that fits, and the largest chunk of the loss that fits with it; where
    `train.batch_tokens` is a number, that one, whether it fits or not.

    On a CPU `auto` takes no more than `USEFUL_ON_CPU` tokens unless a conversation is longer. For SmolLM2-135M (V_d
    8,192, 3 steps of test-time training, bfloat16, one thread) a second of CPU time trained 1,300 tokens in
    micro-batches of 512, 1,530 in 1,024, 1,640 in 2,048 and 1,730 in 4,096, whose peak is 170 MB higher.

    Args:
        what: is trained.
        longest: tokens of the longest conversation, which is never cut.
        config: of the training.
        loss_rows: the largest chunk.
        free: bytes.
        most: tokens of a micro-batch where a training goes on, so that it computes what it would have without a stop.

    Raises:
        ConfigError: not even the longest conversation fits, with the smallest chunk.
    """
    share = config.step_tokens
    if what.processes > 1:  # whole conversations are dealt out
        share = min(share, -(-share // what.processes) + longest)
    asked = config.batch_tokens
    if asked != "auto":
        at_once = Sizes(max(longest, min(share, asked)), loss_rows)
        return Budget(Sizes(asked, loss_rows), need(what, at_once), free)
    rows = max(longest, min(share, most or share, USEFUL_ON_CPU if what.on_cpu else share))
    while True:
        sizes = Sizes(rows, loss_rows)
        found = Budget(sizes, need(what, sizes), free)
        if found.need <= (1 - MARGIN) * free:
            return found
        if rows > longest:
            rows = max(longest, rows - GRAIN)
        elif loss_rows > LEAST_LOSS_ROWS:
            loss_rows //= 2
        else:
            raise ConfigError(
                f"training would need about {found.need / GIB:,.2f} GiB for its longest conversation of {longest:,} "
                f"tokens alone, {free / GIB:,.2f} GiB are free; lower data.max_length, method.ttt_steps or "
                "method.draft_vocab_size, take a device with more memory, or set train.batch_tokens to try it anyway"
            )
