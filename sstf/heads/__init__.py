"""Draft-head modules and their attention."""

from sstf.heads.block import BlockHead, BlockShape
from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle_fused import FusedEagle

__all__ = ["BlockHead", "BlockShape", "Eagle3Head", "EagleShape", "FusedEagle"]
