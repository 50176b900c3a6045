"""The worked token table of `features/dataset.py`, value by value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sstf.features import Features, collate, rows_ahead, to_device
from sstf.types import FeatureBatch, HiddenTeacher, TopKTeacher


def conversation(tokens: int, prompt: int, base: int = 0) -> Features:
    """x_t = base + t; h_t = 100 + x_t; taps 200 + x_t; the teacher's argmax at h_t is 300 + x_t, its lse 400 + x_t."""
    x = base + torch.arange(tokens)
    return with_mask(x, torch.arange(tokens) >= prompt)


def with_mask(x: Tensor, mask: Tensor) -> Features:
    known = torch.cat([mask[1:], torch.tensor([False])])  # h_t is kept where x_{t+1} is trained
    return Features(
        features=(200.0 + x)[:, None].expand(-1, 3),
        teacher_token=torch.where(known, 300 + x, -1),
        teacher=HiddenTeacher((100.0 + x[known])[:, None].expand(-1, 2), 400.0 + x[known]),
        input_ids=x,
        loss_mask=mask,
    )


def hidden_of(batch: FeatureBatch) -> HiddenTeacher:
    assert isinstance(batch.teacher, HiddenTeacher)
    return batch.teacher


def test_the_worked_table() -> None:
    batch = collate([conversation(6, prompt=2)])
    #                       row:    0      1      2      3
    assert batch.features[:, 0].tolist() == [200, 201, 202, 203]  # aux(h_t)
    assert batch.input_ids.tolist() == [1, 2, 3, 4]  # x_{t+1}
    assert hidden_of(batch).hidden[:, 0].tolist() == [101, 102, 103, 104]  # h_{t+1}
    assert hidden_of(batch).lse.tolist() == [401, 402, 403, 404]
    assert batch.teacher_token.tolist() == [301, 302, 303, 304]
    assert batch.labels.tolist() == [2, 3, 4, 5]  # x_{t+2}
    assert batch.loss_mask.tolist() == [True, True, True, True]
    assert batch.features.shape == (4, 3)
    assert batch.lengths == (4,)
    assert hidden_of(batch).hidden.shape == (4, 2)


def test_the_answers_first_token_is_supervised_and_the_prompts_are_not() -> None:
    batch = collate([conversation(6, prompt=4)])
    # Rows 0 and 1 supervise x_2 and x_3, the prompt; rows 2 and 3 supervise x_4 and x_5, the answer.
    assert batch.labels[batch.loss_mask].tolist() == [4, 5]
    assert hidden_of(batch).hidden[:, 0].tolist() == [103, 104]  # h_3 and h_4 predict them
    assert batch.teacher_token.tolist() == [-1, -1, 303, 304]


def test_nothing_behind_the_answers_end_is_supervised() -> None:
    # x_4 .. x_6 are the next request
    batch = collate([with_mask(torch.arange(7), torch.tensor([0, 0, 1, 1, 0, 0, 0]).bool())])
    assert batch.labels[batch.loss_mask].tolist() == [2, 3]
    assert hidden_of(batch).hidden[:, 0].tolist() == [101, 102]


def test_teachers_follow_the_mask_through_a_batch() -> None:
    """Two answers, a second token that is trained (h_0 is stored, but no row can use it), and nothing trained."""
    masks = [[0, 0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0]]
    rows = [with_mask(10 * i + torch.arange(len(m)), torch.tensor(m).bool()) for i, m in enumerate(masks)]
    assert len(rows[1].teacher.lse) == 2  # type: ignore[union-attr]
    batch = collate(rows)
    assert batch.lengths == (5, 3, 2)
    # Row t of conversation i has the teacher of h_{t+1}, whose lse was made 400 + x_{t+1}.
    assert hidden_of(batch).lse.tolist() == (400 + batch.input_ids[batch.loss_mask]).tolist() == [401, 402, 405, 411]
    assert batch.teacher_token[batch.loss_mask].tolist() == [301, 302, 305, 311]


def test_top_k_teachers_are_joined_alike() -> None:
    def row(*tokens: int) -> Features:
        top = TopKTeacher(torch.tensor([[t, t + 1] for t in tokens]), torch.tensor([[-t / 8, -9.0] for t in tokens]))
        plain = conversation(len(tokens) + 1, prompt=1)  # x_1 is trained, so the first teacher is dropped
        return replace(plain, teacher=top)

    teacher = collate([row(1, 2, 3), row(4, 5)]).teacher
    assert isinstance(teacher, TopKTeacher)
    assert teacher.tokens.tolist() == [[2, 3], [3, 4], [5, 6]]
    assert teacher.log_probs[:, 0].tolist() == [-2 / 8, -3 / 8, -5 / 8]


def test_conversations_stand_one_after_the_other() -> None:
    parts = [conversation(6, prompt=2), conversation(3, prompt=2, base=90), conversation(4, prompt=2, base=50)]
    batch = collate(parts)
    assert batch.lengths == (4, 1, 2)
    assert batch.features[:, 0].tolist() == [200, 201, 202, 203, 290, 250, 251]
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 91, 51, 52]
    assert hidden_of(batch).hidden[:, 1].tolist() == [101, 102, 103, 104, 191, 151, 152]
    alone = [collate([part]) for part in parts]
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, torch.cat([getattr(one, name) for one in alone])), name
    assert torch.equal(hidden_of(batch).lse, torch.cat([hidden_of(one).lse for one in alone]))


def test_to_device_moves_the_teacher_too() -> None:
    batch = to_device(collate([conversation(6, prompt=2)]), torch.device("meta"))
    assert {t.device.type for t in (*vars(batch.teacher).values(), batch.features, batch.loss_mask)} == {"meta"}


def test_rows_ahead_do_not_leave_their_document() -> None:
    rows, there = rows_ahead((2, 1, 3), 3, torch.device("cpu"))
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5], [1, 1, 2, 4, 5, 5], [1, 1, 2, 5, 5, 5]]
    assert there.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]


def test_a_later_step_reads_the_next_token_under_the_next_teacher() -> None:
    """Step i at row t: token x_{t+1+i}, teacher of h_{t+1+i}, supervised token x_{t+2+i}, and the mask moves along."""
    batch = collate([conversation(8, prompt=3), conversation(5, prompt=4, base=20)])
    rows, there = rows_ahead(batch.lengths, 3, torch.device("cpu"))
    ahead = rows[2][there[2]]
    assert there[2].int().tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0]
    assert batch.input_ids[ahead].tolist() == [3, 4, 5, 6, 23]
    assert batch.teacher_token[ahead].tolist() == [303, 304, 305, 306, 323]
    assert batch.labels[ahead].tolist() == [4, 5, 6, 7, 24]
    assert batch.loss_mask[ahead].tolist() == [True, True, True, True, True]
