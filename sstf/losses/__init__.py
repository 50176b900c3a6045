"""Per-token objectives and their fused form; torch alone."""

from sstf.losses.acceptance import accepted_drafts
from sstf.losses.eager import Added, Distilled, distill
from sstf.losses.fused import CHUNK, fused_distill
from sstf.losses.objectives import CrossEntropy, Kl, LkAlpha, LkHybrid, Mixed, Objective, TotalVariation
from sstf.losses.position_weights import DPace, Exponential, PositionWeights
from sstf.losses.teachers import Teacher, Teachers, teacher, top_k_teacher

__all__ = [
    "CHUNK",
    "Added",
    "CrossEntropy",
    "DPace",
    "Distilled",
    "Exponential",
    "Kl",
    "LkAlpha",
    "LkHybrid",
    "Mixed",
    "Objective",
    "PositionWeights",
    "Teacher",
    "Teachers",
    "TotalVariation",
    "accepted_drafts",
    "distill",
    "fused_distill",
    "teacher",
    "top_k_teacher",
]
