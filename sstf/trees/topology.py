"""What follows from the parents of a draft tree: ancestor masks, depths, children, unions. One place for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sstf.types import DraftTree


def ancestor_mask(parents: Int[Tensor, "*batch node"], depth: int | None = None) -> Bool[Tensor, "*batch node node"]:
    """Entry [i, j] is True where j is i or an ancestor of i: what node i may attend to within the tree.

    Args:
        parents: of one tree, or of several with equally many nodes.
        depth: a bound on the nodes' depth; with it, nothing is read back from the device.

    >>> ancestor_mask(torch.tensor([-1, 0, -1]))
    tensor([[ True, False, False],
            [ True,  True, False],
            [False, False,  True]])
    """
    count = parents.shape[-1]
    # Column `count` stands for the root, which is its own parent, so that every pointer always has a target.
    mask = torch.zeros(*parents.shape, count + 1, dtype=torch.bool, device=parents.device)
    up = torch.cat([torch.where(parents < 0, count, parents), torch.full_like(parents[..., :1], count)], -1)
    pointer = torch.arange(count, device=parents.device).expand_as(parents)
    for _ in range(count if depth is None else min(depth, count)):
        mask.scatter_(-1, pointer[..., None], True)
        pointer = up.gather(-1, pointer)
    return mask[..., :count]


def depths(mask: Bool[Tensor, "*batch node node"]) -> Int[Tensor, "*batch node"]:
    """Depth of each node from its ancestor mask; children of the root have depth 1."""
    return mask.sum(-1)


def children(parents: list[int]) -> dict[int, list[int]]:
    """Children of every node, in node order; key -1 is the root.

    >>> children([-1, 0, -1])
    {-1: [0, 2], 0: [1]}
    """
    below: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        below.setdefault(parent, []).append(node)
    return below


def pass_tail(within: Bool[Tensor, "batch node node"]) -> Bool[Tensor, "batch rows rows"]:
    """What the rows of a verify pass see of each other: row 0 is the root, seen by all; row i + 1 is node i."""
    tail = torch.nn.functional.pad(within, (1, 0, 1, 0))
    tail[:, :, 0] = True
    return tail


def behind(
    tail: Bool[Tensor, "batch rows new"], lengths: Sequence[int], visible: int
) -> Bool[Tensor, "batch rows visible"]:
    """A mask over all keys: every row sees its sequence's past, then what `tail` says, and nothing behind that.

    Args:
        tail: among the keys that lie directly behind the past.
        lengths: keys in the past of each sequence.
        visible: keys in all.
    """
    batch, rows, new = tail.shape
    if batch == 1 and lengths[0] + new == visible:
        return torch.cat([tail.new_ones(1, rows, lengths[0]), tail], -1)
    kinds = torch.nn.functional.pad(torch.nn.functional.pad(tail, (0, 1)), (1, 0), value=True)
    past = torch.tensor(lengths, device=tail.device)
    kind = (torch.arange(visible, device=tail.device) - past[:, None] + 1).clamp_(0, new + 1)
    return kinds.gather(2, kind[:, None].expand(-1, rows, -1))


def union(first: DraftTree, second: DraftTree) -> DraftTree:
    """A tree with the paths of both. Shared paths appear once; among siblings, those of `first` come first.

    Both must be deterministic proposals. `confidence` stays where both have it, of `first` on shared nodes.

    >>> below = torch.tensor([-1, 0])
    >>> union(DraftTree(torch.tensor([5, 6]), below), DraftTree(torch.tensor([5, 7]), below))
    DraftTree(tokens=tensor([5, 6, 7]), parents=tensor([-1,  0,  0]), confidence=None, draft_probs=None, ranks=None)
    """
    if not len(second):
        return first
    if not len(first):
        return second
    tokens, parents = first.tokens.tolist(), first.parents.tolist()
    where = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    moved: list[int] = []  # node of the union that stands for each node of `second`
    added: list[int] = []
    for node, (token, parent) in enumerate(zip(second.tokens.tolist(), second.parents.tolist(), strict=True)):
        key = (moved[parent] if parent >= 0 else -1, token)
        if key not in where:
            where[key] = len(tokens)
            tokens.append(token)
            parents.append(key[0])
            added.append(node)
        moved.append(where[key])
    both = first.confidence is not None and second.confidence is not None
    device = first.tokens.device
    return DraftTree(
        torch.tensor(tokens, device=device),
        torch.tensor(parents, device=device),
        torch.cat([first.confidence, second.confidence[added]]) if both else None,  # type: ignore[list-item, index]
        ranks=None if first.ranks is None else torch.cat([first.ranks, first.ranks.new_zeros(len(added))]),
    )


def prune(tree: DraftTree, keep: Sequence[bool]) -> DraftTree:
    """The tree without the nodes where `keep` is False, and without what hangs below them."""
    kept: list[int] = []
    number: dict[int, int] = {-1: -1}
    for node, parent in enumerate(tree.parents.tolist()):
        if keep[node] and parent in number:
            number[node] = len(kept)
            kept.append(node)
    index = torch.tensor(kept, dtype=torch.int64, device=tree.tokens.device)
    rows = torch.cat([torch.zeros_like(index[:1]), index + 1]) if kept else torch.zeros(1, dtype=torch.int64)
    return DraftTree(
        tree.tokens[index],
        torch.tensor([number[int(tree.parents[node])] for node in kept], dtype=torch.int64, device=index.device),
        None if tree.confidence is None else tree.confidence[index],
        None if tree.draft_probs is None else tree.draft_probs[rows.to(index.device)],
        None if tree.ranks is None else tree.ranks[index],
    )
