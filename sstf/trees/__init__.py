"""Draft trees: topology, policies and growth; torch alone."""

from sstf.trees.growth import DraftContext, Drawing, grow
from sstf.trees.policies import AnyTree, Chain, CostAwareTree, DynamicTree, StaticTree, TreePolicy
from sstf.trees.topology import ancestor_mask, behind, children, depths, pass_tail, prune, union

__all__ = [
    "AnyTree",
    "Chain",
    "CostAwareTree",
    "DraftContext",
    "Drawing",
    "DynamicTree",
    "StaticTree",
    "TreePolicy",
    "ancestor_mask",
    "behind",
    "children",
    "depths",
    "grow",
    "pass_tail",
    "prune",
    "union",
]
