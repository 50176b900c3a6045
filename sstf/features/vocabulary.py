"""What a draft vocabulary is chosen from: how often each target token is trained, or how likely the target finds it.

A head can only propose tokens of its draft vocabulary, so at each position the chance of acceptance is at most the
probability that the target gives to that vocabulary. Choosing by the sum of the target's probabilities over all trained
positions loses the least of it (the sum is the expected mass); choosing by counts is the same sum with each
distribution replaced by the one token that was drawn from it. So the two can be added: probabilities for as many
conversations as there is time for, counts for the rest. Both come from the training conversations alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sstf.features.source import FeatureSource
from sstf.targets import FrozenHead
from sstf.types import TopKTeacher

MASS_ROWS = 65536  # trained positions that are looked at: the whole vocabulary is computed for each
_LOGIT_ROWS = 128  # rows of [row, vocab] held at once


def token_counts(source: FeatureSource, indices: Sequence[int]) -> Int64[Tensor, "vocab"]:
    """How often each target id is a trained token of these conversations."""
    counts = torch.zeros(source.target.vocab_size, dtype=torch.int64)
    for i in indices:
        ids, mask = source.tokens_of(i)
        counts.index_add_(0, ids[mask], torch.ones(int(mask.sum()), dtype=torch.int64))
    return counts


def teacher_mass(
    source: FeatureSource, frozen: FrozenHead, indices: Sequence[int], rows: int = MASS_ROWS
) -> tuple[Float64[Tensor, "vocab"], int]:
    """The target's probability of each token, summed over the trained positions of whole conversations.

    Args:
        source: The features.
        frozen: On the device on which to compute.
        indices: The conversations, in the order in which they are looked at.
        rows: Positions after which no further conversation is looked at.

    Returns:
        The sums, without the probability of tokens that a top-k teacher left out; and how many conversations they are
        of.
    """
    mass = torch.zeros(source.target.vocab_size, dtype=torch.float64, device=frozen.lm_head.device)
    seen = used = 0
    for i in indices:
        if seen >= rows:
            break
        used += 1
        if source.lengths[i] < 3:
            continue
        teacher = source.batch([i]).teacher
        if isinstance(teacher, TopKTeacher):
            probs = teacher.log_probs.to(mass.device, torch.float64).exp()
            mass.index_add_(0, teacher.tokens.to(mass.device).reshape(-1), probs.reshape(-1))
            seen += len(teacher.tokens)
        else:
            for hidden in teacher.hidden.to(mass.device).split(_LOGIT_ROWS):
                mass += torch.softmax(frozen.logits(hidden), -1).sum(0, dtype=torch.float64)
            seen += len(teacher.hidden)
    return mass.cpu(), used
