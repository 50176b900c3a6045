from __future__ import annotations

import math

import pytest
import torch

from sstf.losses import teacher, top_k_teacher
from sstf.losses import teachers as teachers_module


def test_teacher_by_hand() -> None:
    # Over the whole vocabulary of four: 1/2, 1/4, 1/8, 1/8. The draft vocabulary holds the first two.
    full = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 7
    found = teacher(full[:, :2], full.logsumexp(-1))
    torch.testing.assert_close(found.probs, torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(found.coverage, torch.tensor([0.75]))
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(found.entropy, torch.tensor([entropy]))
    assert found.token.tolist() == [0]


def test_coverage_is_never_above_one() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    found = teacher(logits, logits.logsumexp(-1) - 1e-3)
    assert float(found.coverage.max()) == 1.0
    torch.testing.assert_close(found.probs, torch.softmax(logits, -1))


@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_teacher_by_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers_module, "CACHED", 3 * 20)
    logits = 3 * torch.randn(rows, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    kept = logits.clone()
    full_lse = logits.float().logsumexp(-1) + 0.5
    found = teacher(logits, full_lse)
    probs = (logits.float() - full_lse[:, None]).exp()
    torch.testing.assert_close(found.probs, probs)
    torch.testing.assert_close(found.coverage, probs.sum(-1))
    torch.testing.assert_close(found.entropy, torch.special.entr(torch.softmax(logits.float(), -1)).sum(-1))
    assert found.token.tolist() == logits.float().argmax(-1).tolist()
    assert torch.equal(logits, kept)  # the caller's


def test_top_k_teacher_by_hand() -> None:
    # Over a vocabulary of six: 1/2, 1/4, 1/8, 1/16, ... The three best are target ids 4, 0, 5; ids 0, 4 and 2 can be
    # drafted, in this order. So 4 and 0 stay (5 cannot be drafted, 2 is not among the best): 3/4 of the mass.
    found = top_k_teacher(
        torch.tensor([[4, 0, 5]]), torch.tensor([[0.5, 0.25, 0.125]]).log(), torch.tensor([0, 4, 2]), vocab_size=6
    )
    torch.testing.assert_close(found.probs, torch.tensor([[0.25, 0.5, 0.0]]))
    torch.testing.assert_close(found.coverage, torch.tensor([0.75]))
    torch.testing.assert_close(found.entropy, torch.tensor([-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))]))
    assert found.token.tolist() == [1]


def test_top_k_of_the_whole_vocabulary_is_the_exact_teacher() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = 3 * torch.randn(6, 11, generator=generator)
    draft_tokens = torch.tensor([9, 1, 4, 7, 2])
    exact = teacher(logits[:, draft_tokens], logits.logsumexp(-1))
    top = torch.log_softmax(logits, -1).topk(11, -1)
    found = top_k_teacher(top.indices, top.values, draft_tokens, 11)
    for name in ("probs", "coverage", "entropy", "token"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), msg=name)


def test_what_top_k_leaves_out_shrinks_with_k() -> None:
    logits = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    draft_tokens = torch.arange(0, 50, 2)
    exact = teacher(logits[:, draft_tokens], logits.logsumexp(-1))
    log_probs = torch.log_softmax(logits, -1)
    coverages = []
    for k in (25, 40, 50):
        top = log_probs.topk(k, -1)
        found = top_k_teacher(top.indices, top.values, draft_tokens, 50)
        torch.testing.assert_close(found.probs.sum(-1), found.coverage)
        assert bool((found.coverage <= exact.coverage + 1e-6).all())
        coverages.append(float(found.coverage.sum()))
    assert coverages == sorted(coverages)
