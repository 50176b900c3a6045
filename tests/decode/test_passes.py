"""Passes over trees of several sequences, against a fresh forward of each path: what a node sees, and what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sstf.decode.passes import Passes
from sstf.targets import Target
from sstf.types import DraftTree

SLOTS = 3
Step = dict[int, tuple[list[int], list[int], int]]  # slot -> tokens, parents, the node down to which it is accepted


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, parents) of 0 to 7 nodes."""
    count = draw(st.integers(0, 7))
    return (
        draw(st.lists(st.integers(3, 299), min_size=count, max_size=count)),
        [draw(st.integers(-1, node - 1)) for node in range(count)],
    )


@st.composite
def rounds(draw: st.DrawFn, slots: int) -> list[Step]:
    """Two passes: for some slots a tree, and the node down to which it is accepted (-1: none of it)."""
    found = []
    for _ in range(2):
        active = draw(st.sets(st.integers(0, slots - 1), min_size=1))
        chosen = {}
        for slot in sorted(active):
            tokens, parents = draw(trees())
            chosen[slot] = (tokens, parents, draw(st.integers(-1, len(tokens) - 1)))
        found.append(chosen)
    return found


def branch(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*branch(parents, parents[node]), node]


@torch.inference_mode()
def last_logits(target: Target, text: list[int]) -> Tensor:
    found: Tensor = target.model(torch.tensor([text]), use_cache=False).logits[0, -1]
    return found


@torch.inference_mode()
def check(target: Target, slots: int, prompts: list[list[int]], plan: list[Step]) -> None:
    passes = Passes(target, None, slots, 64)
    texts = [list(prompt) for prompt in prompts]  # what each slot's cache holds
    for slot, prompt in enumerate(prompts):
        logits, _ = passes.prefill(slot, prompt)
        torch.testing.assert_close(logits, last_logits(target, prompt), atol=2e-5, rtol=1e-4)
    for number, step in enumerate(plan):
        active, root = list(step), 100 + number
        past = [len(texts[slot]) for slot in active]
        drafts = [
            DraftTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64))
            for tokens, parents, _ in step.values()
        ]
        logits, _ = passes.verify(active, past, [root] * len(active), drafts)
        kept = []
        for i, (slot, (tokens, parents, accepted)) in enumerate(step.items()):
            for node in range(-1, len(tokens)):
                path = [tokens[above] for above in branch(parents, node)]
                expected = last_logits(target, [*texts[slot], root, *path])
                torch.testing.assert_close(logits[i, node + 1], expected, atol=2e-5, rtol=1e-4)
            kept.append([0, *(node + 1 for node in branch(parents, accepted))])
        passes.keep(active, past, kept)
        for (slot, (tokens, _, _)), rows in zip(step.items(), kept, strict=True):
            texts[slot] += [root, *(tokens[row - 1] for row in rows[1:])]


# The second pass stands on what the first kept; a last one without trees shows what the second kept.
@pytest.mark.parametrize("slots", [1, SLOTS])
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_nodes_see_their_path_and_what_is_kept_is_as_if_computed_anew(
    slots: int, data: st.DataObject, tiny_target: Target
) -> None:
    prompts = data.draw(
        st.lists(st.lists(st.integers(3, 299), min_size=1, max_size=9), min_size=slots, max_size=slots), "prompts"
    )
    last: Step = {slot: ([], [], -1) for slot in range(slots)}
    check(tiny_target, slots, prompts, [*data.draw(rounds(slots), "rounds"), last])


def test_rows_moved_past_each_other(tiny_target: Target) -> None:
    """By hand: in one batch a deep branch behind wrong siblings, nothing, and a chain that lies where it belongs."""
    deep = ([11, 12, 13, 14, 15, 16], [-1, -1, 0, 1, 1, 4], 5)  # accepted: nodes 1, 4, 5
    chain = ([21, 22, 23], [-1, 0, 1], 1)
    plan = [{0: deep, 1: ([], [], -1), 2: chain}, {0: chain, 2: deep}, {slot: ([], [], -1) for slot in range(3)}]
    check(tiny_target, 3, [[5, 6, 7], [8], [9, 10, 11, 12, 13]], plan)


def test_one_sequence_by_hand(tiny_target: Target) -> None:
    deep = ([11, 12, 13, 14, 15, 16], [-1, -1, 0, 1, 1, 4], 5)  # accepted: nodes 1, 4, 5
    late = ([21, 22, 23, 24, 25], [-1, -1, -1, -1, 3], 4)  # nodes 3, 4
    check(tiny_target, 1, [[5, 6, 7]], [{0: deep}, {0: late}, {0: ([], [], -1)}])
