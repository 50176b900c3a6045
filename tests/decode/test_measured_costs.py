"""Which passes are timed, and what is said of those that are not."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from sstf.decode import measure_costs
from sstf.decode.cost import KNOTS
from sstf.targets import Target


@pytest.mark.parametrize(("rows", "expected"), [(1, (1, 2)), (5, (1, 2, 4, 8)), (8, (1, 2, 4, 8)), (64, KNOTS)])
def test_only_sizes_that_are_needed_are_run(tiny_target: Target, rows: int, expected: tuple[int, ...]) -> None:
    """Each in a round that warms up and in one that counts, behind a prefill of 16 tokens."""
    measure_costs(tiny_target, None, (), repeats=1, past=16, rows=1)  # what a target finds out once
    seen: list[int] = []

    def note(module: nn.Module, arguments: object, output: Tensor) -> None:
        seen.append(output.shape[1])

    handle = tiny_target.decoder.embed_tokens.register_forward_hook(note)
    try:
        found = measure_costs(tiny_target, None, (), repeats=1, past=16, rows=rows)
    finally:
        handle.remove()
    assert seen == [16, *expected, *expected]
    last = len(expected) - 1
    slope = (found.verify_s[last] - found.verify_s[last - 1]) / (KNOTS[last] - KNOTS[last - 1])
    for knot, seconds in list(zip(KNOTS, found.verify_s, strict=True))[len(expected) :]:
        assert seconds == pytest.approx(found.verify_s[last] + slope * (knot - KNOTS[last]))
