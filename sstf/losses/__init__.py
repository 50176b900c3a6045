"""Per-token objectives and their fused forms; torch alone."""

from sstf.losses.acceptance import accepted_drafts
from sstf.losses.distill import Distilled, Teacher, distill, fused_distill, teacher

__all__ = ["Distilled", "Teacher", "accepted_drafts", "distill", "fused_distill", "teacher"]
