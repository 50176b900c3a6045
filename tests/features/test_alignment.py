"""The worked token table of `features/dataset.py`, value by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sstf.features import Features, collate, shift_left


def conversation(tokens: int, prompt: int, base: int = 0) -> Features:
    """x_t = base + t; h_t = 100 + x_t; taps 200 + x_t; the teacher's argmax at h_t is 300 + x_t, its lse 400 + x_t."""
    x = base + torch.arange(tokens)
    return Features(
        features=(200.0 + x)[:, None].expand(-1, 3),
        hidden=(100.0 + x)[:, None].expand(-1, 2),
        teacher_token=300 + x,
        teacher_lse=400.0 + x,
        input_ids=x,
        loss_mask=torch.arange(tokens) >= prompt,
    )


def test_the_worked_table() -> None:
    batch = collate([conversation(6, prompt=2)])
    #                       row:    0      1      2      3
    assert batch.features[0, :, 0].tolist() == [200, 201, 202, 203]  # aux(h_t)
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4]  # x_{t+1}
    assert batch.teacher_hidden[0, :, 0].tolist() == [101, 102, 103, 104]  # h_{t+1}
    assert batch.teacher_token[0].tolist() == [301, 302, 303, 304]
    assert batch.teacher_lse[0].tolist() == [401, 402, 403, 404]
    assert batch.labels[0].tolist() == [2, 3, 4, 5]  # x_{t+2}
    assert batch.loss_mask[0].tolist() == [True, True, True, True]
    assert batch.features.shape == (1, 4, 3)
    assert batch.teacher_hidden.shape == (1, 4, 2)


def test_the_answers_first_token_is_supervised_and_the_prompts_are_not() -> None:
    batch = collate([conversation(6, prompt=4)])
    # Rows 0 and 1 supervise x_2 and x_3, the prompt; rows 2 and 3 supervise x_4 and x_5, the answer.
    assert batch.labels[0][batch.loss_mask[0]].tolist() == [4, 5]


def test_nothing_behind_the_answers_end_is_supervised() -> None:
    row = conversation(7, prompt=2)
    row.loss_mask[4:] = False  # x_4 .. x_6 are the next request
    batch = collate([row])
    assert batch.labels[0][batch.loss_mask[0]].tolist() == [2, 3]


def test_padding_stands_at_the_end_and_is_not_supervised() -> None:
    batch = collate([conversation(6, prompt=2), conversation(4, prompt=2, base=50)])
    assert batch.features[1, :, 0].tolist() == [250, 251, 0, 0]
    assert batch.input_ids[1].tolist() == [51, 52, 0, 0]
    assert batch.teacher_hidden[1, :, 1].tolist() == [151, 152, 0, 0]
    assert batch.teacher_token[1].tolist() == [351, 352, 0, 0]
    assert batch.teacher_lse[1].tolist() == [451, 452, 0, 0]
    assert batch.labels[1].tolist() == [52, 53, 0, 0]
    assert batch.loss_mask[1].tolist() == [True, True, False, False]
    alone = collate([conversation(6, prompt=2)])
    for name, value in vars(alone).items():
        assert torch.equal(getattr(batch, name)[:1], value), name


@pytest.mark.parametrize(
    ("by", "expected"), [(0, [1, 2, 3, 4]), (1, [2, 3, 4, 0]), (3, [4, 0, 0, 0]), (4, [0, 0, 0, 0]), (9, [0, 0, 0, 0])]
)
def test_shift_left(by: int, expected: list[int]) -> None:
    rows = torch.tensor([[1, 2, 3, 4]])
    assert shift_left(rows, by).tolist() == [expected]
    assert shift_left(rows > 0, by).tolist() == [[value > 0 for value in expected]]


def test_a_later_step_reads_the_next_token_under_the_next_teacher() -> None:
    """Step i at row t: token x_{t+1+i}, teacher of h_{t+1+i}, supervised token x_{t+2+i}, and the mask moves along."""
    batch = collate([conversation(8, prompt=3)])

    def row(tensor: Tensor, step: int) -> list[int]:
        return shift_left(tensor, step)[0].tolist()

    assert row(batch.input_ids, 2) == [3, 4, 5, 6, 0, 0]
    assert row(batch.teacher_token, 2) == [303, 304, 305, 306, 0, 0]
    assert row(batch.labels, 2) == [4, 5, 6, 7, 0, 0]
    assert row(batch.loss_mask, 2) == [True, True, True, True, False, False]
