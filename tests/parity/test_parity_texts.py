"""Replaying decoding from drafts that were made along a text."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.parity.texts import Text, replayed

TEXT = Text([7, 7], [1, 2, 3, 4])  # rows 0 to 3 draft x_2 .. x_5, which are 1 2 3 4; decoding begins at row 1
ROWS = torch.arange(4)


def lengths(*steps: list[int]) -> list[int]:
    return replayed(torch.tensor(steps), ROWS, TEXT)


def test_by_hand() -> None:
    assert lengths([1, 2, 9, 4], [2, 3, 4, 9]) == [3]  # 2, 3 and the bonus token 4
    assert lengths([1, 9, 3, 4], [2, 3, 4, 9]) == [1, 2]  # nothing, then 3 and 4, behind which the text ends
    assert lengths([1, 9, 3, 9], [2, 3, 9, 9]) == [1, 2]  # 3 and the bonus token
    assert lengths([9, 9, 9, 9]) == [1, 1, 1]
    assert lengths([9, 9, 3, 9]) == [1, 2]


@given(answer=st.lists(st.integers(0, 3), min_size=3, max_size=12), depth=st.integers(1, 4), data=st.data())
@settings(deadline=None)
def test_every_token_is_emitted_once(answer: list[int], depth: int, data: st.DataObject) -> None:
    text = Text([5, 5, 5], answer)
    rows = torch.arange(1, len(text.ids) - 2)
    drafted = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)), min_size=depth, max_size=depth
            )
        )
    )
    found = replayed(drafted, rows, text)
    assert sum(found) == len(answer) - 1  # the first comes from the prefill
    assert all(1 <= length <= depth + 1 for length in found)


@given(answer=st.lists(st.integers(0, 9), min_size=3, max_size=20), depth=st.integers(1, 5))
@settings(deadline=None)
def test_perfect_drafts(answer: list[int], depth: int) -> None:
    text = Text([5, 5], answer)
    rows = torch.arange(0, len(text.ids) - 2)
    ids = [*text.ids, *[-1] * depth]
    drafted = torch.tensor([[ids[int(row) + 2 + step] for row in rows] for step in range(depth)])
    assert len(replayed(drafted, rows, text)) == -(-(len(answer) - 1) // (depth + 1))
