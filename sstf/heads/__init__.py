"""Draft-head modules and their attention."""

from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.heads.eagle_fused import FusedEagle
from sstf.heads.ttt_attention import ttt_attention, ttt_attention_reference

__all__ = ["Eagle3Head", "EagleShape", "FusedEagle", "ttt_attention", "ttt_attention_reference"]
