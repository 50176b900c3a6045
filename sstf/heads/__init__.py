"""Draft-head modules and their attention."""

from sstf.heads.block import BlockHead, BlockShape
from sstf.heads.block_corrections import DominoHead, DSparkHead
from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle1 import Eagle1Head, FusedEagle1
from sstf.heads.eagle_fused import FusedEagle
from sstf.heads.early_exit import EarlyExitHead, ExitShape, FusedExit
from sstf.heads.medusa import MedusaHead, MedusaShape
from sstf.heads.p_eagle import PEagleHead

__all__ = [
    "BlockHead",
    "BlockShape",
    "DSparkHead",
    "DominoHead",
    "Eagle1Head",
    "Eagle3Head",
    "EagleShape",
    "EarlyExitHead",
    "ExitShape",
    "FusedEagle",
    "FusedEagle1",
    "FusedExit",
    "MedusaHead",
    "MedusaShape",
    "PEagleHead",
]
