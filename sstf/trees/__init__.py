"""Draft trees: topology, growth policies; torch alone."""

from sstf.trees.policies import Chain, DynamicTree, TreePolicy, grow
from sstf.trees.topology import ancestor_mask, children, depths

__all__ = ["Chain", "DynamicTree", "TreePolicy", "ancestor_mask", "children", "depths", "grow"]
