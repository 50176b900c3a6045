"""Which conversations each optimiser step takes, and who computes which of them.

What a step IS (`step_tokens`, the seed) is settled here, apart from how it is computed: the number of processes and the
size of micro-batches, which memory decides, change rounding only. So a run may stop and go on with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sstf.errors import ConfigError
from sstf.features import epoch_batches
from sstf.train.config import TrainConfig


def plan_steps(rows: Sequence[int], config: TrainConfig, seed: int) -> list[list[int]]:
    """The steps of a run, each a list of positions into `rows`; a pure function of its arguments.

    Args:
        rows: tokens that each training conversation has to compute.
        config: gives the length of the run and the size of a step.
        seed: of the order.
    """
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < (config.steps or math.inf) and epoch < (config.epochs or math.inf):
        steps += epoch_batches(rows, config.step_tokens, seed, epoch)
        epoch += 1
    return steps[: config.steps] if config.steps else steps


def check_processes(steps: Sequence[Sequence[int]], processes: int, step_tokens: int) -> None:
    """Refuse processes that would mostly wait.

    Raises:
        ConfigError: most steps have fewer conversations than there are processes.
    """
    short = sum(len(step) < processes for step in steps)
    if 2 * short > len(steps):
        raise ConfigError(
            f"{short} of {len(steps)} steps have fewer conversations (train.step_tokens={step_tokens}) than the "
            f"{processes} processes, so that some have nothing to do; raise train.step_tokens or start fewer processes"
        )


def shares(step: Sequence[int], rows: Sequence[int], processes: int) -> list[list[int]]:
    """Deal the conversations of a step out to the processes, with about equal tokens for each.

    Longest first, each to the process that has least so far; so all of them know what each of them does.

    >>> shares([0, 1, 2, 3], [7, 2, 4, 3], 2)
    [[0, 1], [2, 3]]
    """
    given: list[list[int]] = [[] for _ in range(processes)]
    load = [0] * processes
    for index in sorted(step, key=lambda i: (-rows[i], i)):
        least = load.index(min(load))
        given[least].append(index)
        load[least] += rows[index]
    return given


def micro_batches(share: Sequence[int], rows: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut a process's share into pieces that fit in memory; a conversation that is longer is a piece alone.

    >>> micro_batches([0, 1, 2, 3], [7, 2, 4, 3], 9)
    [[0, 1], [2, 3]]
    """
    pieces: list[list[int]] = []
    room = 0
    for index in share:
        if rows[index] > room:
            pieces.append([])
            room = batch_tokens
        pieces[-1].append(index)
        room -= rows[index]
    return pieces
