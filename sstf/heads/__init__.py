"""Draft-head modules and their attention."""

from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle_fused import FusedEagle
from sstf.heads.early_exit import EarlyExitHead, ExitShape, FusedExit

__all__ = ["Eagle3Head", "EagleShape", "EarlyExitHead", "ExitShape", "FusedEagle", "FusedExit"]
