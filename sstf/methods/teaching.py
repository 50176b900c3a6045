"""What the trained methods share about their teacher: the target's distributions over a draft vocabulary."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sstf.losses import Teacher, Teachers, teacher, top_k_teacher
from sstf.row_blocks import filled
from sstf.targets import FrozenHead
from sstf.types import HiddenTeacher, TeacherRows


def teachers_over(draft_tokens: Tensor, given: TeacherRows, rows: Tensor, frozen: FrozenHead) -> Teachers:
    """Makes the target's distributions over the draft vocabulary, of the teacher's rows where `rows` [row] is True."""
    if isinstance(given, HiddenTeacher):
        hidden, lse = given.hidden[rows], given.lse[rows]
        # Gathered once for all chunks; ascending ids that are as many as the target's are the target's.
        whole = len(draft_tokens) == len(frozen.lm_head)
        small = frozen if whole else dataclasses.replace(frozen, lm_head=frozen.lm_head[draft_tokens])

        def exact(some: slice) -> Teacher:
            logits = small.native_logits(filled(hidden[some]))
            return teacher(logits[: some.stop - some.start], lse[some])

        return exact
    tokens, log_probs = given.tokens[rows], given.log_probs[rows]

    def top_k(some: slice) -> Teacher:
        return top_k_teacher(tokens[some], log_probs[some], draft_tokens, len(frozen.lm_head))

    return top_k
