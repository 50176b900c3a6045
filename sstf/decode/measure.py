"""What passes cost on this machine, measured: the cost model's first values."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch

from sstf.decode.cost import KNOTS, CostModel
from sstf.decode.passes import Passes
from sstf.methods import Drafter
from sstf.methods.base import News
from sstf.targets import Target
from sstf.trees import Chain, DraftContext
from sstf.types import DraftTree

PAST = 128  # tokens in the cache while measuring
DEPTH = 4  # of the drafts measured


@torch.inference_mode()
def measure_costs(
    target: Target,
    drafter: Drafter | None,
    layers: Sequence[int],
    slots: int = 1,
    repeats: int = 3,
    past: int = PAST,
    rows: int = KNOTS[-1],
) -> CostModel:
    """Time verify passes of the sizes in `KNOTS`, and drafting, in turn, behind `past` tokens; medians of `repeats`.

    Sizes that nobody needs are not measured: those above the first knot that holds `rows` go on with the last slope.
    Host work starts at 0: decoding itself teaches it. A drafter is left without sequences.
    """
    needed = KNOTS[: max(2, bisect_left(KNOTS, rows) + 1)]
    past = min(past, target.context // 2)
    knots = [min(knot, target.context - past) for knot in needed]
    with target.tap(layers) as taps:
        passes = Passes(target, taps if layers else None, slots, past + needed[-1] + 1)
        features = [passes.prefill(slot, [1] * past)[1] for slot in range(slots)]
        times: dict[int, list[float]] = {knot: [] for knot in needed}
        drafts: list[float] = []
        for _ in range(repeats + 1):
            for knot, size in zip(needed, knots, strict=True):
                times[knot].append(_time(target, partial(_verify, passes, slots, past, size)))
            if drafter:
                drafter.start(slots, past + DEPTH + 2)
                first = [News(slot, [1] * (past - 1), features[slot][1:]) for slot in range(slots)]
                drafter.propose(first, Chain(depth=1), DraftContext(1))
                news = [News(slot, [1], features[slot][:1]) for slot in range(slots)]
                again = partial(drafter.propose, news, Chain(depth=DEPTH), DraftContext(DEPTH))
                seconds = _time(target, again)
                drafts.append(seconds / max(1, drafter.levels))
    # The first round warms up.
    verify_s = list(accumulate((statistics.median(times[knot][1:]) for knot in needed), max))  # more rows cost no less
    slope = (verify_s[-1] - verify_s[-2]) / (needed[-1] - needed[-2])
    verify_s += [verify_s[-1] + slope * (knot - needed[-1]) for knot in KNOTS[len(needed) :]]
    return CostModel(verify_s, draft_s=statistics.median(drafts[1:]) if drafts else 0.0, host_s=0.0)


def _verify(passes: Passes, slots: int, past: int, rows: int) -> object:
    device = passes.target.device
    nodes = torch.ones(rows - 1, dtype=torch.int64, device=device)
    tree = DraftTree(nodes, torch.arange(-1, rows - 2, device=device))
    return passes.verify(range(slots), [past] * slots, [1] * slots, [tree] * slots)


def _time(target: Target, work: Callable[[], object]) -> float:
    def now() -> float:
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter()

    started = now()
    work()
    return now() - started
