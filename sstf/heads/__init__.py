"""Draft-head modules and their attention."""

from sstf.heads.block import BlockHead, BlockShape
from sstf.heads.block_corrections import DominoHead, DSparkHead
from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle_fused import FusedEagle

__all__ = ["BlockHead", "BlockShape", "DSparkHead", "DominoHead", "Eagle3Head", "EagleShape", "FusedEagle"]
