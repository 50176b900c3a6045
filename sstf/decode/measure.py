"""What passes cost on this machine, measured: the cost model's first values."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from sstf.decode.cost import KNOTS, CostModel
from sstf.decode.layered import LayeredPasses, open_passes
from sstf.decode.passes import Passes
from sstf.methods import Drafter
from sstf.methods.base import News
from sstf.targets import SplitDecoder, Target
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
    split: SplitDecoder | None = None,
) -> CostModel:
    """Time verify passes of the sizes in `KNOTS`, and drafting, in turn, behind `past` tokens; medians of `repeats`.

    Sizes that nobody needs are not measured: those above the first knot that holds `rows` go on with the last slope.
    Host work starts at 0: decoding itself teaches it. A drafter is left without sequences. With a `split`, a pass of
    more than one row begins where the drafter ended, all nodes but one being drafted.
    """
    needed = KNOTS[: max(2, bisect_left(KNOTS, rows) + 1)]
    past = min(past, target.context // 2)
    knots = [min(knot, target.context - past) for knot in needed]
    with target.tap(layers) as taps:
        passes = open_passes(target, split, taps if layers else None, slots, past + 2 * needed[-1] + 1)
        shallow = passes if isinstance(passes, LayeredPasses) else None
        features = [passes.prefill(slot, [1] * past)[1] for slot in range(slots)]
        times: dict[int, list[float]] = {knot: [] for knot in needed}
        drafts: list[float] = []
        for _ in range(repeats + 1):
            for knot, size in zip(needed, knots, strict=True):
                if shallow and size > 1:
                    shallow.root(range(slots), [past] * slots, [1] * slots)
                    if size > 2:
                        tokens = _nodes(target, size - 2).expand(slots, -1)
                        shallow.descend(torch.zeros_like(tokens), tokens)
                times[knot].append(_time(target, partial(_verify, passes, slots, past, size)))
            if drafter:
                drafter.start(slots, past + DEPTH + 2, shallow)
                first = [News(slot, [1] * (past - 1), features[slot][1:]) for slot in range(slots)]
                drafter.propose(first, Chain(depth=1), DraftContext(1))
                news = [News(slot, [1], features[slot][:1]) for slot in range(slots)]
                again = partial(drafter.propose, news, Chain(depth=DEPTH), DraftContext(DEPTH))
                seconds = _time(target, again)
                drafts.append(seconds / max(1, drafter.levels))
                if shallow:  # forgets what was drafted
                    shallow.verify(range(slots), [past] * slots, [1] * slots, [DraftTree.empty(target.device)] * slots)
    # The first round warms up.
    verify_s = list(accumulate((statistics.median(times[knot][1:]) for knot in needed), max))  # more rows cost no less
    slope = (verify_s[-1] - verify_s[-2]) / (needed[-1] - needed[-2])
    verify_s += [verify_s[-1] + slope * (knot - needed[-1]) for knot in KNOTS[len(needed) :]]
    return CostModel(verify_s, draft_s=statistics.median(drafts[1:]) if drafts else 0.0, host_s=0.0)


def _verify(passes: Passes, slots: int, past: int, rows: int) -> object:
    nodes = _nodes(passes.target, rows - 1)
    tree = DraftTree(nodes, torch.full_like(nodes, -1))
    return passes.verify(range(slots), [past] * slots, [1] * slots, [tree] * slots)


def _nodes(target: Target, count: int) -> Tensor:
    """Different children of the root."""
    return torch.arange(count, device=target.device) % target.spec.vocab_size


def _time(target: Target, work: Callable[[], object]) -> float:
    def now() -> float:
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter()

    started = now()
    work()
    return now() - started
