from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sstf.trees import ancestor_mask, children, depths


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    """Any tree whose parents precede their children."""
    count = draw(st.integers(0, 40))
    return [draw(st.integers(-1, node - 1)) for node in range(count)]


def lineage(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [node, *lineage(parents, parents[node])]


@given(parent_lists())
def test_mask_is_the_ancestor_relation(parents: list[int]) -> None:
    mask = ancestor_mask(torch.tensor(parents, dtype=torch.int64))
    count = len(parents)
    assert mask.tolist() == [[j in lineage(parents, i) for j in range(count)] for i in range(count)]
    assert depths(mask).tolist() == [len(lineage(parents, i)) for i in range(count)]


@given(parent_lists())
def test_children_invert_parents(parents: list[int]) -> None:
    below = children(parents)
    assert sorted(node for nodes in below.values() for node in nodes) == list(range(len(parents)))
    for parent, nodes in below.items():
        assert nodes == sorted(nodes)
        assert all(parents[node] == parent for node in nodes)
