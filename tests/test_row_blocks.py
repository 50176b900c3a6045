"""Products over whole blocks of rows: the same numbers, and few shapes however the lengths of a batch vary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sstf import row_blocks
from sstf.methods import Eagle3Config, build_method
from sstf.row_blocks import ROWS, filled
from sstf.targets import Target
from sstf.types import FeatureBatch, HiddenTeacher

METHOD = build_method(Eagle3Config(ttt_steps=3, draft_vocab_size=150))
DRAFT_TOKENS = torch.arange(0, 300, 2)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear"}


def batch_of(lengths: tuple[int, ...], seed: int) -> FeatureBatch:
    """Random rows, about 60 % of them supervised."""
    torch.manual_seed(seed)
    seq = sum(lengths)
    loss_mask = torch.rand(seq) < 0.6
    teacher = HiddenTeacher(torch.randn(int(loss_mask.sum()), 64), torch.full((int(loss_mask.sum()),), 9.0))
    token = torch.where(loss_mask, torch.randint(0, 300, (seq,)), -1)
    ids = torch.randint(0, 300, (2, seq))
    return FeatureBatch(torch.randn(seq, 192), ids[0], teacher, token, ids[1], loss_mask, lengths)


def new_head(target: Target) -> torch.nn.Module:
    torch.manual_seed(0)
    return METHOD.build_head(target.spec, target.frozen_head, DRAFT_TOKENS)


class Shapes(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in PRODUCTS:
            self.seen.add((func._schema.name, *(tuple(a.shape) for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


def test_filled() -> None:
    assert torch.equal(filled(torch.ones(ROWS, 2)), torch.ones(ROWS, 2))
    table = filled(torch.ones(ROWS + 3, 2, dtype=torch.int64))
    assert table.shape == (2 * ROWS, 2) and table.dtype == torch.int64
    assert table[: ROWS + 3].all() and not table[ROWS + 3 :].any()
    mask = filled(torch.ones(5, dtype=torch.bool))
    assert mask.dtype == torch.bool and int(mask.sum()) == 5 and len(mask) == ROWS
    assert len(filled(torch.ones(0, 3))) == 0


@pytest.mark.parametrize("lengths", [(40, 1, 7), (ROWS,), (100, 3, 60), (1,)])
def test_blocks_change_no_number(
    lengths: tuple[int, ...], tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, frozen, batch = new_head(tiny_target), tiny_target.frozen_head, batch_of(lengths, 1)
    found = []
    for rows in (ROWS, 1):
        monkeypatch.setattr(row_blocks, "ROWS", rows)
        head.zero_grad()
        output = METHOD.loss(head, batch, frozen)
        output.loss.backward()
        found.append((output, [p.grad.clone() for p in head.parameters() if p.grad is not None]))
    (blocks, of_blocks), (plain, of_plain) = found
    torch.testing.assert_close(vars(blocks), vars(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_blocks, of_plain, rtol=1e-5, atol=1e-5)


def sizes_of_products(target: Target, lengths: tuple[int, ...]) -> set[int]:
    head = new_head(target)
    with Shapes() as shapes:
        METHOD.loss(head, batch_of(lengths, 1), target.frozen_head).loss.backward()
    return {size for _, *tensors in shapes.seen for shape in tensors for size in shape}


def test_rows_of_every_product_are_whole_blocks(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(300, 90), (311, 95), (200, 150, 33), (384, 20), (37, 1, 2)]
    found = [sizes_of_products(tiny_target, lengths) for lengths in batches]
    of_weights = {size for size in set.union(*found) if size % ROWS}
    assert {64, 150, 192} <= of_weights  # hidden, draft vocabulary, taps: the products were seen
    assert all({size for size in one if size % ROWS} == of_weights for one in found)
    monkeypatch.setattr(row_blocks, "ROWS", 1)
    assert {sum(batches[0]), sum(batches[1])} <= set.union(*(sizes_of_products(tiny_target, one) for one in batches))
