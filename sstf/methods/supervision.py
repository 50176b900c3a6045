"""Which rows a method's loss learns from, by whom they are taught, and what the loss reports. Shared by methods whose
draft position i at row t is taught by the teacher of row t + i.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sstf.features.dataset import rows_ahead
from sstf.losses import Distilled, Teacher, Teachers, teacher, top_k_teacher
from sstf.row_blocks import filled, missing
from sstf.targets import FrozenHead
from sstf.types import FeatureBatch, HiddenTeacher, StepOutput, TeacherRows


@dataclass(frozen=True)
class Supervision:
    """Of a batch. A pair (position, row) is taught where `valid` is True."""

    ahead: Int[Tensor, "position seq"]  # the row that teaches, see `rows_ahead`
    there: Bool[Tensor, "position seq"]  # whether it exists in the document
    supervised: Bool[Tensor, "seq"]  # written by the assistant, and its teacher's token is in the draft vocabulary
    valid: Bool[Tensor, "position seq"]
    rejected: Float[Tensor, "position seq"] | None = None  # see `FeatureBatch`

    @property
    def reverse(self) -> Float[Tensor, "row"] | None:
        """Weight of the reverse KL of each valid pair; None where nothing is replayed."""
        return None if self.rejected is None else self.rejected[self.valid]

    @property
    def teacher_rows(self) -> Int[Tensor, "row"]:
        """Of each valid pair, among the teachers that `teachers_over` makes for `supervised`."""
        return (self.supervised.cumsum(0) - 1)[self.ahead[self.valid]]


def supervise(batch: FeatureBatch, positions: int, t2d: Bool[Tensor, "vocab"]) -> Supervision:
    """All pairs that the batch can teach."""
    ahead, there = rows_ahead(batch.lengths, positions, batch.loss_mask.device)
    supervised = batch.loss_mask & t2d[batch.teacher_token.clamp_min(0)]
    return Supervision(ahead, there, supervised, there & supervised[ahead], batch.rejected)


def outcome(
    batch: FeatureBatch,
    taught: Supervision,
    result: Distilled,
    draft_tokens: Tensor,
    drafted: Bool[Tensor, "seq"] | None = None,
) -> StepOutput:
    """What `loss` returns, from the results of the valid pairs, ordered by position and row.

    Chains are those that lie wholly in supervised text, at anchors where `drafted` (None: everywhere); a token outside
    the draft vocabulary is a miss.
    """
    whole = (taught.there & batch.loss_mask[taught.ahead]).all(0)
    if drafted is not None:
        whole &= drafted
    return reported(result.loss_sum, result, draft_tokens, batch.teacher_token[taught.ahead], taught.valid, whole)


def reported(
    loss: Float[Tensor, ""],
    result: Distilled,
    draft_tokens: Tensor,
    taught: Int[Tensor, "position row"],
    valid: Bool[Tensor, "position row"],
    whole: Bool[Tensor, "row"],
) -> StepOutput:
    """`loss` and what the trainer counts beside it.

    Args:
        loss: summed.
        result: of the valid pairs, ordered by position and row.
        draft_tokens: target ids of what the head can propose.
        taught: the teacher's token of each pair.
        valid: pairs that were taught.
        whole: rows that all of a chain can be followed from.
    """
    counts = valid.sum(-1)
    hits = torch.zeros_like(valid)
    hits[valid] = draft_tokens[result.draft_token] == taught[valid]
    lengths = counts.tolist()
    return StepOutput(
        loss=loss,
        valid=counts.float(),
        losses=torch.stack([part.sum() for part in result.losses.split(lengths)]),
        hits=hits.sum(-1).float(),
        overlap=torch.stack([part.sum() for part in result.overlap.split(lengths)]),
        chain_hits=hits[:, whole],
    )


def in_blocks(batch: FeatureBatch) -> FeatureBatch:
    """With a document behind the others that teaches nothing, so that the rows are whole blocks (`row_blocks`)."""
    lacking = missing(len(batch.input_ids), batch.input_ids.device)
    if not lacking:
        return batch
    return dataclasses.replace(
        batch,
        features=filled(batch.features),
        input_ids=filled(batch.input_ids),
        teacher_token=filled(batch.teacher_token),
        labels=filled(batch.labels),
        loss_mask=filled(batch.loss_mask),
        rejected=None if batch.rejected is None else F.pad(batch.rejected, (0, lacking)),
        lengths=(*batch.lengths, lacking),
    )


def rows_in_blocks(taught: Bool[Tensor, "seq"]) -> Int[Tensor, "row"]:
    """Places of the rows that are True, and of as many others as their blocks have room for; ascending."""
    lacking = missing(int(taught.sum()), taught.device)
    return torch.cat([taught.nonzero()[:, 0], (~taught).nonzero()[:lacking, 0]]).sort().values


def teachers_over(draft_tokens: Tensor, given: TeacherRows, rows: Tensor, frozen: FrozenHead) -> Teachers:
    """Makes the target's distributions over the draft vocabulary, of the teacher's rows where `rows` [row] is True."""
    if isinstance(given, HiddenTeacher):
        hidden, lse = given.hidden[rows], given.lse[rows]
        # Gathered once for all chunks.
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
