"""What follows from the parents of a draft tree: ancestor masks, depths, children."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def ancestor_mask(parents: Int[Tensor, "node"]) -> Bool[Tensor, "node node"]:
    """Entry [i, j] is True where j is i or an ancestor of i: what node i may attend to within the tree.

    >>> ancestor_mask(torch.tensor([-1, 0, -1]))
    tensor([[ True, False, False],
            [ True,  True, False],
            [False, False,  True]])
    """
    count = len(parents)
    # Column `count` stands for the root, which is its own parent, so that every pointer always has a target.
    mask = torch.zeros(count, count + 1, dtype=torch.bool, device=parents.device)
    up = torch.cat([torch.where(parents < 0, count, parents), parents.new_tensor([count])])
    pointer = torch.arange(count, device=parents.device)
    while bool((pointer < count).any()):
        mask.scatter_(1, pointer[:, None], True)
        pointer = up[pointer]
    return mask[:, :count]


def depths(mask: Bool[Tensor, "node node"]) -> Int[Tensor, "node"]:
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
