"""What the tests of all block drafters share: heads far from flat, batches, a loss written out, drafting by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sstf.heads import BlockHead
from sstf.methods.base import News
from sstf.methods.block import BlockDrafter
from sstf.targets import FrozenHead, Target
from sstf.trees import Chain, DraftContext
from sstf.types import FeatureBatch, HiddenTeacher, StepOutput

LAYERS = 3  # of the target, read
EVEN = torch.arange(0, 300, 2)
SLOTS = 5


def random_head(method: Any, target: Target, draft_tokens: Tensor = EVEN, seed: int = 1, spread: float = 0.15) -> Any:
    torch.manual_seed(seed)
    head = method.build_head(target.spec, target.frozen_head, draft_tokens)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=spread)
    return head


def make_batch(frozen: FrozenHead, lengths: tuple[int, ...], trained: float = 0.7, seed: int = 4) -> FeatureBatch:
    generator = torch.Generator().manual_seed(seed)
    seq, hidden_size = sum(lengths), frozen.lm_head.shape[1]
    hidden = torch.randn(seq, hidden_size, generator=generator)
    logits = frozen.logits(hidden)
    mask = torch.rand(seq, generator=generator) < trained
    return FeatureBatch(
        features=torch.randn(seq, LAYERS * hidden_size, generator=generator),
        input_ids=torch.randint(300, (seq,), generator=generator),
        teacher=HiddenTeacher(hidden[mask], logits.logsumexp(-1)[mask]),
        teacher_token=torch.where(mask, logits.argmax(-1), -1),
        labels=torch.randint(300, (seq,), generator=generator),
        loss_mask=mask,
        lengths=lengths,
        seeds=tuple(range(100, 100 + len(lengths))),
    )


def documents(batch: FeatureBatch) -> list[FeatureBatch]:
    """Each as a batch of its own."""
    assert isinstance(batch.teacher, HiddenTeacher)
    columns = {name: rows for name, rows in vars(batch).items() if isinstance(rows, Tensor)}
    trained = [int(part.sum()) for part in batch.loss_mask.split(batch.lengths)]
    found = []
    for i, length in enumerate(batch.lengths):
        own = {name: rows.split(batch.lengths)[i] for name, rows in columns.items()}
        teacher = HiddenTeacher(batch.teacher.hidden.split(trained)[i], batch.teacher.lse.split(trained)[i])
        rest = {"lengths": (length,), "seeds": batch.seeds[i : i + 1], "progress": batch.progress}
        found.append(FeatureBatch(**own, teacher=teacher, **rest))
    return found


@dataclass(frozen=True)
class Draft:
    """One supervised draft of one block, with what its loss is made of; float64."""

    position: int
    log_probs: Tensor  # [draft_vocab], carries the graph
    base_log_probs: Tensor  # without the correction
    kept: Tensor  # [draft_vocab], the target's over the whole vocabulary, cut
    label: int  # draft id
    hidden: Tensor
    state: Tensor

    @property
    def cross_entropy(self) -> Tensor:
        return -self.log_probs[self.label]

    @property
    def overlap(self) -> Tensor:
        return torch.minimum(self.kept, self.log_probs.exp()).sum()


BlockLoss = Callable[[list[Draft]], Tensor]  # the supervised drafts of one block -> its loss


def naive(head: BlockHead, batch: FeatureBatch, frozen: FrozenHead, block_loss: BlockLoss) -> StepOutput:
    """Document by document, block by block, draft by draft; every row that is trained has a block."""
    ids, drafts = head.draft_tokens.tolist(), head.shape.drafts
    total = torch.zeros((), dtype=torch.float64)
    valid, hits, overlap = ([0.0] * drafts for _ in range(3))
    chains: list[list[bool]] = []
    for document in documents(batch):
        (seq,) = document.lengths
        assert isinstance(document.teacher, HiddenTeacher)
        teacher_row = {int(t): i for i, (t,) in enumerate(document.loss_mask.nonzero())}
        for t in range(seq):
            if not document.loss_mask[t]:
                continue
            hidden = head.fill_reference(document.features, document.input_ids, (seq,), [t])[0]
            state = head.path_start(document.input_ids[t])
            block: list[Draft] = []
            hit = []
            for i in range(min(drafts, seq - t)):
                if i:
                    state = head.path_next(state, document.input_ids[t + i])
                label = int(document.teacher_token[t + i])
                if document.loss_mask[t + i] and label in ids:
                    base = hidden[i] @ head.lm_head.T
                    logits = base
                    if head.correction is not None:
                        logits = base + head.correction @ head.low_rank(hidden[i], state)
                    full = torch.softmax(frozen.logits(document.teacher.hidden[teacher_row[t + i]]).double(), -1)
                    one = Draft(
                        i, torch.log_softmax(logits.double(), -1), torch.log_softmax(base.double(), -1),
                        full[head.draft_tokens], ids.index(label), hidden[i], state,
                    )  # fmt: skip
                    block.append(one)
                    valid[i] += 1
                    hit.append(int(one.log_probs.argmax()) == one.label)
                    hits[i] += hit[-1]
                    overlap[i] += float(one.overlap.detach())
                else:
                    hit.append(False)
            if block:
                total = total + block_loss(block)
            if t + drafts <= seq and bool(document.loss_mask[t : t + drafts].all()):
                chains.append(hit)
    numbers = [torch.tensor(row, dtype=torch.float32) for row in (valid, valid, hits, overlap)]
    return StepOutput(total, *numbers, torch.tensor(chains, dtype=torch.bool).reshape(-1, drafts).T)


def with_hits(head: BlockHead, batch: FeatureBatch) -> FeatureBatch:
    """Some drafts become the teacher's token, so that hits are counted."""
    token = batch.teacher_token.clone()
    rows = batch.loss_mask.nonzero()[:, 0].tolist()
    hidden = head.fill_reference(batch.features, batch.input_ids, batch.lengths, rows)
    states = head.path_start(batch.input_ids[rows])
    logits = hidden[:, 0] @ head.lm_head.T
    if head.correction is not None:
        logits = logits + head.low_rank(hidden[:, 0], states) @ head.correction.T
    for row, best in list(zip(rows, logits.argmax(-1).tolist(), strict=True))[::2]:
        token[row] = head.draft_tokens[best]
    return replace(batch, teacher_token=token)


def compare(found: StepOutput, expected: StepOutput, head: BlockHead, rtol: float = 1e-4) -> None:
    assert found.valid.tolist() == expected.valid.tolist()
    assert found.hits.tolist() == expected.hits.tolist() and float(found.hits.sum()) > 0
    assert found.chain_hits.tolist() == expected.chain_hits.tolist()
    torch.testing.assert_close(found.overlap, expected.overlap, atol=1e-4, rtol=rtol)
    torch.testing.assert_close(found.loss.double(), expected.loss, atol=1e-4, rtol=rtol)
    parameters = dict(head.named_parameters())
    grads = torch.autograd.grad(found.loss, list(parameters.values()))
    by_hand = torch.autograd.grad(expected.loss, list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, grads, by_hand, strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert float((one - other).norm()) <= 2e-5 * max(1.0, float(other.norm())), name
    assert any(float(grad.norm()) > 0 for grad in grads)


def packed_is_the_sum(method: Any, head: BlockHead, batch: FeatureBatch, frozen: FrozenHead) -> None:
    packed = method.loss(head, batch, frozen)
    alone = [method.loss(head, one, frozen) for one in documents(batch)]
    parameters = list(head.parameters())
    total = torch.stack([one.loss for one in alone]).sum()
    torch.testing.assert_close(packed.loss, total, rtol=1e-6, atol=1e-7)
    for name in ("valid", "hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in alone)), name
    assert torch.equal(packed.chain_hits, torch.cat([one.chain_hits for one in alone], 1))
    found, expected = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]) for loss in (packed.loss, total)
    )
    assert float((found - expected).norm()) <= 3e-6 * max(float(expected.norm()), 1e-6)


def block_outcomes(method: Any, head: BlockHead, batch: FeatureBatch, frozen: FrozenHead) -> Tensor:
    """What each trained row's block drafts, [row, drafts, draft_vocab] logits, fed the text's own tokens."""
    rows = batch.loss_mask.nonzero()[:, 0].tolist()
    hidden = head.fill(batch.features, batch.input_ids, batch.lengths, rows)
    logits = hidden @ head.lm_head.T
    if head.correction is None:
        return logits
    ahead = torch.tensor(rows)[:, None] + torch.arange(head.shape.drafts)
    tokens = batch.input_ids[ahead.clamp_max(len(batch.input_ids) - 1)]
    return logits + head.low_rank(hidden, head.paths(tokens)) @ head.correction.T


def drafted_chains(drafter: BlockDrafter, batch: FeatureBatch, rows: Sequence[int]) -> list[list[int]]:
    """What the drafter proposes behind the text of each of `rows` of one document, as it reads on."""
    drafter.start(1, 64)
    found, read = [], 0
    for row in rows:
        news = News(0, batch.input_ids[read : row + 1].tolist(), batch.features[read : row + 1])
        (tree,) = drafter.propose([news], Chain(depth=drafter.head.shape.drafts), DraftContext(99))
        found.append(tree.tokens.tolist())
        read = row + 1
    return found


def self_fed_chain(head: BlockHead, batch: FeatureBatch, row: int) -> list[int]:
    """The same, by the reference: each draft is the best token behind the drafts before it."""
    hidden = head.fill_reference(batch.features, batch.input_ids, batch.lengths, [row])[0]
    state = head.path_start(batch.input_ids[row])
    chain: list[int] = []
    for i in range(head.shape.drafts):
        if i:
            state = head.path_next(state, torch.tensor(chain[-1]))
        logits = hidden[i] @ head.lm_head.T
        if head.correction is not None:
            logits = logits + head.correction @ head.low_rank(hidden[i], state)
        chain.append(int(head.draft_tokens[logits.argmax()]))
    return chain


def a_batch_drafts_what_each_drafts_alone(make: Callable[[], BlockDrafter], policies: Sequence[Any]) -> None:
    """Sequences of different lengths, in changing company; one ends and another takes its slot."""
    generator = torch.Generator().manual_seed(1)
    taps = make().head.shape.taps
    features, tokens = torch.randn(4, 60, taps, generator=generator), torch.randint(300, (4, 60), generator=generator)
    #           slot, text, from, to
    calls = [
        [(0, 0, 0, 9), (1, 1, 0, 30), (2, 2, 0, 1)],
        [(0, 0, 9, 11), (1, 1, 30, 34), (2, 2, 1, 2)],
        [(0, 0, 11, 12), (2, 2, 2, 5)],
        [(0, 0, 12, 30), (1, 3, 0, 21), (2, 2, 5, 6)],
        [(1, 3, 21, 22), (2, 2, 6, 60)],
    ]
    for policy in policies:
        together, alone = make(), {text: make() for text in range(4)}
        together.start(3, 60)
        for drafter in alone.values():
            drafter.start(1, 60)
        for call in calls:
            for slot, _, start, _ in call:
                if start == 0:
                    together.restart(slot)
            news = [News(slot, tokens[text, a:b].tolist(), features[text, a:b]) for slot, text, a, b in call]
            trees = together.propose(news, policy, DraftContext(9))
            assert together.levels == 1
            for one, tree, (_, text, _, _) in zip(news, trees, call, strict=True):
                (expected,) = alone[text].propose([News(0, one.tokens, one.features)], policy, DraftContext(9))
                assert tree.tokens.tolist() == expected.tokens.tolist()
                assert tree.parents.tolist() == expected.parents.tolist()
                torch.testing.assert_close(tree.confidence, expected.confidence, atol=1e-5, rtol=1e-4)
