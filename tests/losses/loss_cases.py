"""Distributions and objectives that the tests of losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from sstf.losses import CrossEntropy, Kl, LkAlpha, LkHybrid, Mixed, Objective, Teacher, TotalVariation

OBJECTIVES: list[Objective] = [
    Kl(),
    CrossEntropy(),
    TotalVariation(),
    LkAlpha(),
    LkHybrid(),
    LkHybrid(eta=0.5),
    Mixed(),
]


def teacher_of(probs: Tensor) -> Teacher:
    coverage = probs.sum(-1)
    entropy = torch.special.entr(probs / coverage[:, None]).sum(-1)
    return Teacher(probs, coverage, entropy, probs.argmax(-1))


def rows_of(target: Teacher, rows: slice) -> Teacher:
    return Teacher(target.probs[rows], target.coverage[rows], target.entropy[rows], target.token[rows])
