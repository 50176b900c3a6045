"""What rejected drafts add to the loss of each method: a reverse KL at their pairs (position, row)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from block_cases import make_batch, random_head
from torch import Tensor

from sstf.heads import BlockHead, Eagle3Head
from sstf.losses.objectives import FLOOR
from sstf.methods import METHODS, TrainableMethod, build_method
from sstf.methods.block import draw_blocks
from sstf.methods.supervision import supervise
from sstf.targets import Target
from sstf.types import FeatureBatch

LENGTHS = (9, 4, 13)
# Settings under which each method reads three layers or takes three thirds of the features, and drafts three tokens.
SETTINGS: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "num_layers": 1, "layers": (1, 3, 4)},
    "domino": {"block_size": 4, "num_layers": 1, "layers": (1, 3, 4), "gru_size": 8, "rank": 4},
    "dspark": {"block_size": 3, "num_layers": 1, "layers": (1, 3, 4), "rank": 4},
    "eagle": {"ttt_steps": 3},
    "eagle3": {"ttt_steps": 3},
    "early_exit": {"depth": 3},
    "medusa": {"heads": 3},
    "p_eagle": {"depth": 3},
}
TRAINED = sorted(kind for kind, (config, _) in METHODS.items() if isinstance(build_method(config()), TrainableMethod))


def method_of(kind: str, **changes: Any) -> Any:
    return build_method(METHODS[kind][0].model_validate({"kind": kind} | SETTINGS[kind] | changes))


def batch_of(method: Any, target: Target, trained: float = 0.7) -> FeatureBatch:
    batch = make_batch(target.frozen_head, LENGTHS, trained)
    width = target.spec.hidden_size * len(method.feature_spec(target.spec).layers)
    return dataclasses.replace(batch, features=batch.features[:, :width])


def some_rejected(batch: FeatureBatch, positions: int) -> FeatureBatch:
    draw = torch.Generator().manual_seed(8)
    shape = (positions, len(batch.input_ids))
    table = torch.rand(shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.5)
    return dataclasses.replace(batch, rejected=table)


def gradients(method: Any, head: Any, batch: FeatureBatch, target: Target) -> tuple[float, list[Tensor]]:
    output = method.loss(head, batch, target.frozen_head)
    found = torch.autograd.grad(output.loss, list(head.parameters()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, head.parameters(), strict=True)]
    return float(output.loss.detach()), parts


def reverse_kl(logits: Tensor, batch: FeatureBatch, row: int, draft_tokens: Tensor, target: Target) -> Tensor:
    hidden = batch.teacher.hidden[int(batch.loss_mask[:row].sum())]  # type: ignore[union-attr]
    probs = torch.softmax(target.frozen_head.logits(hidden[None])[0], -1)[draft_tokens]
    log_target = (probs / probs.sum()).clamp_min(FLOOR).log()
    log_draft = torch.log_softmax(logits, -1)
    return (log_draft.exp() * (log_draft - log_target)).sum()


def places(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(row, last row of its document)."""
    found, start = [], 0
    for length in lengths:
        found += [(t, start + length - 1) for t in range(start, start + length)]
        start += length
    return found


def naive(
    method: Any, head: Any, batch: FeatureBatch, target: Target, drafted: dict[tuple[int, int], Tensor]
) -> Tensor:
    """The sum over pairs, written out; `drafted` has the logits of (position, row)."""
    assert batch.rejected is not None
    found = torch.zeros(())
    for row, last in places(batch.lengths):
        for position in range(method.positions):
            taught = row + position
            weight = float(batch.rejected[position, row])
            known = taught <= last and bool(batch.loss_mask[taught]) and bool(head.t2d[batch.teacher_token[taught]])
            if weight and known and (position, row) in drafted:
                logits = drafted[position, row]
                found = found + weight * reverse_kl(logits, batch, taught, head.draft_tokens, target)
    return found


def compare(
    method: Any, head: Any, batch: FeatureBatch, target: Target, drafted: dict[tuple[int, int], Tensor]
) -> None:
    added = naive(method, head, batch, target, drafted)
    expected = torch.autograd.grad(added, list(head.parameters()), allow_unused=True)
    plain_batch = dataclasses.replace(batch, rejected=torch.zeros_like(batch.rejected))  # type: ignore[arg-type]
    (plain, before), (whole, after) = (gradients(method, head, one, target) for one in (plain_batch, batch))
    assert whole - plain == pytest.approx(float(added.detach()), rel=1e-4)
    assert float(added.detach()) > 1
    for first, second, third in zip(before, after, expected, strict=True):
        wanted = torch.zeros_like(first) if third is None else third
        torch.testing.assert_close(second - first, wanted, atol=2e-4, rtol=1e-3)


def test_eagle3_is_the_naive_sum(tiny_target: Target) -> None:
    method = method_of("eagle3")
    head: Eagle3Head = random_head(method, tiny_target)
    batch = some_rejected(batch_of(method, tiny_target), 3)
    taught = supervise(batch, 3, head.t2d)
    outs = head.unroll_reference(head.fuse(batch.features), batch.input_ids, batch.lengths, taught.ahead)
    logits = head.norm(outs) @ head.lm_head.weight.T  # [position, seq, draft_vocab]
    compare(
        method, head, batch, tiny_target, {(i, t): logits[i, t] for i in range(3) for t in range(len(batch.input_ids))}
    )


def test_dflash_is_the_naive_sum(tiny_target: Target) -> None:
    method = method_of("dflash")
    head: BlockHead = random_head(method, tiny_target)
    batch = some_rejected(batch_of(method, tiny_target), 3)
    rows = batch.loss_mask.nonzero()[:, 0].tolist()  # blocks begin where the first draft was written by the assistant
    logits = head.fill(batch.features, batch.input_ids, batch.lengths, rows) @ head.lm_head.T
    compare(method, head, batch, tiny_target, {(i, t): logits[at, i] for at, t in enumerate(rows) for i in range(3)})


@pytest.mark.parametrize("kind", TRAINED)
def test_every_method_learns_from_rejected_drafts(kind: str, tiny_target: Target) -> None:
    """None and zeros are the same; each pair that can be taught adds its own, linearly in its weight."""
    method = method_of(kind)
    head = random_head(method, tiny_target).eval()
    plain = batch_of(method, tiny_target, trained=1.0)
    nothing = torch.zeros(method.positions, len(plain.input_ids))
    value, grads = gradients(method, head, plain, tiny_target)

    def with_weight(position: int, row: int, weight: float) -> tuple[float, list[Tensor]]:
        table = nothing.clone()
        table[position, row] = weight
        return gradients(method, head, dataclasses.replace(plain, rejected=table), tiny_target)

    same, same_grads = with_weight(0, 0, 0.0)
    assert same == pytest.approx(value, rel=1e-6)
    for one, other in zip(same_grads, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    taught = supervise(plain, method.positions, head.t2d)
    # The middle of a document, where no method lacks anything; and a pair whose teacher the text has not.
    position, row = next((i, t) for i in (2, 1) for t in range(1, 5) if taught.valid[i, t])
    once, twice = with_weight(position, row, 1.0)[0] - value, with_weight(position, row, 2.0)[0] - value
    assert once > 1e-3 and twice == pytest.approx(2 * once, rel=1e-2)
    assert with_weight(2, LENGTHS[0] - 2, 5.0)[0] == pytest.approx(value, rel=1e-5)


def test_blocks_with_a_rejected_draft_come_first(tiny_target: Target) -> None:
    """Five anchors of a document of thirteen rows: the three with a rejection are among them, whatever is drawn."""
    batch = dataclasses.replace(batch_of(method_of("dflash"), tiny_target, trained=1.0))
    table = torch.zeros(3, sum(LENGTHS))
    chosen = [14, 20, 24]  # of the last document, which begins at 13
    table[[0, 1, 2], chosen] = 1.0
    everywhere = torch.ones(sum(LENGTHS), dtype=torch.bool)
    drawn = set()
    for seed in range(6):
        given = dataclasses.replace(batch, rejected=table, seeds=(seed, seed, seed))
        rows = [row for row in draw_blocks(given, everywhere, 3, 5).rows if row >= 13]
        assert len(rows) == 5 and set(chosen) <= set(rows) and rows == sorted(rows)
        drawn |= set(rows)
    assert len(drawn) > 7  # the others are drawn
    few = draw_blocks(dataclasses.replace(batch, rejected=table), everywhere, 3, 2).rows
    assert set(row for row in few if row >= 13) < set(chosen)


def test_conditional_drop_keeps_rejected_drafts(tiny_target: Target) -> None:
    """P-EAGLE trains deep positions at a share of the rows; rejected ones are among them."""
    method = method_of("p_eagle", cod_retain=0.1, cod_floor=0.0)
    head = random_head(method, tiny_target).train()
    batch = batch_of(method, tiny_target, trained=1.0)
    table = torch.zeros(3, sum(LENGTHS))
    taught = supervise(batch, 3, head.t2d).valid[2].nonzero()[:, 0]
    table[2, taught] = 1.0
    replayed = dataclasses.replace(batch, rejected=table)
    assert float(method.loss(head, replayed, tiny_target.frozen_head).valid[2]) == len(taught)
    assert float(method.loss(head, batch, tiny_target.frozen_head).valid[2]) < len(taught)


def test_settings_name_every_trained_method() -> None:
    assert sorted(SETTINGS) == TRAINED
