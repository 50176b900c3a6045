"""Draft-head modules and their attention."""

from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle1 import Eagle1Head, FusedEagle1
from sstf.heads.eagle_fused import FusedEagle
from sstf.heads.p_eagle import PEagleHead

__all__ = ["Eagle1Head", "Eagle3Head", "EagleShape", "FusedEagle", "FusedEagle1", "PEagleHead"]
