from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.trees import ancestor_mask, behind, children, depths, pass_tail, union
from sstf.trees.topology import prune
from sstf.types import DraftTree


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


@given(st.lists(st.tuples(parent_lists(), st.integers(0, 9)), min_size=1, max_size=4), st.integers(0, 3))
@settings(deadline=None)
def test_what_a_batch_of_padded_trees_sees(batch: list[tuple[list[int], int]], spare: int) -> None:
    nodes = max(len(parents) for parents, _ in batch)
    lengths = [length for _, length in batch]
    visible = max(lengths) + nodes + 1 + spare
    # Padding hangs below the root.
    padded = [[*parents, *[-1] * (nodes - len(parents))] for parents, _ in batch]
    within = ancestor_mask(torch.tensor(padded, dtype=torch.int64).view(len(batch), nodes), depth=nodes)
    mask = behind(pass_tail(within), lengths, visible)
    assert mask.shape == (len(batch), nodes + 1, visible)

    def sees(parents: list[int], length: int, row: int, key: int) -> bool:
        if key <= length:  # the text, and the root
            return True
        return key - length - 1 in lineage(parents, row - 1)

    assert mask.tolist() == [
        [[sees(parents, length, row, key) for key in range(visible)] for row in range(nodes + 1)]
        for parents, length in zip(padded, lengths, strict=True)
    ]


Path = tuple[int, ...]


@st.composite
def path_trees(draw: st.DrawFn) -> tuple[DraftTree, list[Path]]:
    """A tree whose siblings differ, with the path to every node, in an order in which parents come first."""
    ends = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=6))
    paths: list[Path] = []
    for end in ends:
        paths += [end[:i] for i in range(1, len(end) + 1) if end[:i] not in paths]
    return tree_of(paths), paths


def tree_of(paths: list[Path]) -> DraftTree:
    """Its confidences name the nodes, its ranks are their tokens."""
    tokens = torch.tensor([path[-1] for path in paths], dtype=torch.int64)
    parents = torch.tensor([paths.index(path[:-1]) if path[:-1] else -1 for path in paths], dtype=torch.int64)
    return DraftTree(tokens, parents, torch.arange(len(paths)) / 64, ranks=tokens)


def paths_of(tree: DraftTree) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        assert -1 <= parent < len(found)
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@given(path_trees(), path_trees())
def test_union_has_the_paths_of_both_once(one: tuple[DraftTree, list[Path]], two: tuple[DraftTree, list[Path]]) -> None:
    (first, paths), (second, others) = one, two
    both = union(first, second)
    assert paths_of(both) == [*paths, *(path for path in others if path not in paths)]
    assert both.confidence is not None and first.confidence is not None and second.confidence is not None
    wanted = dict(zip(others, second.confidence.tolist(), strict=True))
    wanted |= dict(zip(paths, first.confidence.tolist(), strict=True))
    assert both.confidence.tolist() == [wanted[path] for path in paths_of(both)]
    assert both.ranks is not None
    if paths:
        assert both.ranks.tolist() == [path[-1] if path in paths else 0 for path in paths_of(both)]


@given(path_trees(), st.data())
def test_prune_takes_what_hangs_below(tree: tuple[DraftTree, list[Path]], data: st.DataObject) -> None:
    whole, paths = tree
    keep = data.draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths)))
    rows = torch.arange(len(paths) + 1)[:, None] * torch.ones(1, 3)
    drawn = DraftTree(whole.tokens, whole.parents, whole.confidence, rows, whole.ranks)
    left = prune(drawn, keep)
    gone = {path for path, kept in zip(paths, keep, strict=True) if not kept}
    alive = [path for path in paths if not any(path[:i] in gone for i in range(1, len(path) + 1))]
    assert paths_of(left) == alive
    numbers = [paths.index(path) for path in alive]
    assert left.confidence is not None and left.draft_probs is not None and left.ranks is not None
    assert left.confidence.tolist() == [number / 64 for number in numbers]
    assert left.ranks.tolist() == [path[-1] for path in alive]
    assert left.draft_probs[:, 0].tolist() == [0, *(number + 1 for number in numbers)]
