"""Passes of rounded sizes, which a GPU replays as graphs: run directly here, they must give the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import expected, random_head  # noqa: F401 - a fixture

from sstf.decode import SpeculativeDecoder
from sstf.decode.passes import Passes
from sstf.methods.cached_drafter import FeedbackDrafter
from sstf.targets import Target
from sstf.targets.graphs import ROWS, GraphRunner, padded_keys, padded_rows
from sstf.trees import AnyTree, Chain, DynamicTree, StaticTree
from sstf.types import SamplingParams

CPU = torch.device("cpu")


def test_rounding() -> None:
    assert [padded_rows(n) for n in (1, 3, 9, 17, 64)] == [1, 4, 16, 24, 64]
    assert padded_rows(65) is None
    assert [padded_keys(n, 700) for n in (1, 256, 257, 600)] == [256, 256, 512, 700]


def test_work_reads_buffers_that_stay() -> None:
    runner, calls = GraphRunner(CPU), []

    def work(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        calls.append(x["a"].data_ptr())
        return (x["a"] * 2,)

    for value in (1.0, 2.0, 3.0):
        (out,) = runner("double", {"a": torch.full((2,), value)}, work)
        assert out.tolist() == [2 * value, 2 * value]
    assert len(set(calls)) == 1


@pytest.mark.parametrize(
    "policy", [Chain(depth=3), StaticTree.full(3, 2), DynamicTree(depth=4, top_k=4, total_tokens=12)]
)
def test_the_text_is_the_same(
    policy: AnyTree,
    tiny_target: Target,
    expected: list[tuple[list[int], list[int]]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, sizes = Passes.__init__, set()

    def with_graphs(self: Passes, *args: Any) -> None:
        plain(self, *args)
        self.graphs = GraphRunner(CPU)

    replayed = Passes._replayed

    def watched(self: Passes, *args: Any) -> object:
        sizes.add(args[-1].shape[1])
        return replayed(self, *args)

    some = expected[:12]
    head = random_head(tiny_target)
    eager = SpeculativeDecoder(tiny_target, head, policy)
    made = [eager.generate(prompt, 13) for prompt, _ in some]
    monkeypatch.setattr(Passes, "__init__", with_graphs)
    monkeypatch.setattr(Passes, "_replayed", watched)
    decoder = SpeculativeDecoder(tiny_target, head, policy)
    assert isinstance(decoder.drafter, FeedbackDrafter)
    decoder.drafter.graphs = GraphRunner(CPU)
    found = [decoder.generate(prompt, 13) for prompt, _ in some]
    assert [f.token_ids for f in found] == [answer for _, answer in some]
    assert [f.accepted_lengths for f in found] == [m.accepted_lengths for m in made]  # the drafts are the same too
    batch = decoder.generate_batch([prompt for prompt, _ in some], SamplingParams(max_new_tokens=13), slots=5)
    assert [f.token_ids for f in batch] == [answer for _, answer in some]
    assert sizes and sizes <= set(ROWS)
