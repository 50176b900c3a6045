"""Batches, naive losses and checks for heads whose position i at row t sees rows 0..t, and then its own drafts.

The naive forms run one row at a time: position i at row t is the last row of a plain causal text of t + 1 + i rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.losses import Objective, Teacher, distill, teacher
from sstf.methods.base import News, TrainableMethod
from sstf.methods.cached_drafter import CachedDrafter
from sstf.methods.checkpoint import DraftHead, load_head
from sstf.targets import FrozenHead, Target
from sstf.targets.graphs import GraphRunner
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.trees import AnyTree, Chain, DraftContext
from sstf.types import FeatureBatch, HiddenTeacher, SamplingParams, StepOutput, TokenSample, TopKTeacher

CPU = torch.device("cpu")
DRAFT_TOKENS = torch.arange(0, 300, 2)  # the even half of the vocabulary


def make_batch(
    frozen: FrozenHead, lengths: tuple[int, ...], taps: int, trained: float = 0.7, seed: int = 4, eps: float = 1e-6
) -> FeatureBatch:
    """Random states. The last tap is the state before the final norm whose normed form teaches the row in front."""
    generator = torch.Generator().manual_seed(seed)
    seq, size = sum(lengths), len(frozen.final_norm)
    features = torch.randn(seq, taps, generator=generator)
    hidden = F.rms_norm(features[:, -size:], (size,), frozen.final_norm, eps).roll(-1, 0)
    logits = frozen.logits(hidden)
    mask = torch.rand(seq, generator=generator) < trained
    return FeatureBatch(
        features=features,
        input_ids=torch.randint(300, (seq,), generator=generator),
        teacher=HiddenTeacher(hidden[mask], logits.logsumexp(-1)[mask]),
        teacher_token=torch.where(mask, logits.argmax(-1), -1 if trained else 0),
        labels=torch.randint(300, (seq,), generator=generator),
        loss_mask=mask,
        lengths=lengths,
    )


def documents(batch: FeatureBatch) -> list[FeatureBatch]:
    """Each as a batch of its own."""
    columns = {name: rows for name, rows in vars(batch).items() if isinstance(rows, Tensor)}
    trained = [int(part.sum()) for part in batch.loss_mask.split(batch.lengths)]
    found = []
    for i, length in enumerate(batch.lengths):
        own = {name: rows.split(batch.lengths)[i] for name, rows in columns.items()}
        taught = type(batch.teacher)(*(rows.split(trained)[i] for rows in vars(batch.teacher).values()))
        seeds = batch.seeds[i : i + 1]
        found.append(FeatureBatch(**own, teacher=taught, lengths=(length,), seeds=seeds))
    return found


def top_k_of(batch: FeatureBatch, frozen: FrozenHead, k: int) -> FeatureBatch:
    """The same batch, taught by the target's `k` most likely tokens."""
    assert isinstance(batch.teacher, HiddenTeacher)
    top = torch.log_softmax(frozen.logits(batch.teacher.hidden), -1).topk(k, -1)
    return replace(batch, teacher=TopKTeacher(top.indices, top.values))


def causal(layers: Sequence[Any], embeds: Tensor, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """The last layer's output of one text [seq, hidden], by the plain formula of attention."""
    seq = len(x)
    hidden = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    for layer in layers:
        query, key, value = layer.qkv(embeds, x, *turn)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        probs = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        x = layer.finish(x, torch.einsum("hqk,khd->qhd", probs, value))
    return x


# (a document, row) -> what stands behind `lm_head` at each position drafted there, [positions, hidden]
Drafts = Callable[[FeatureBatch, int], Tensor]


@dataclass(frozen=True)
class Naive:
    """Sums of a naive loss."""

    loss: Tensor
    valid: list[float]
    losses: list[float]
    hits: list[float]
    chains: list[list[bool]]


def naive_loss(
    batch: FeatureBatch,
    frozen: FrozenHead,
    draft_tokens: Tensor,
    weight: Tensor,
    drafts: Drafts,
    objective: Objective,
    weights: Sequence[float],
    token_weight: float = 1.0,
    feature_weight: float = 0.0,
    taught: Callable[[int, int, int], bool] = lambda document, position, row: True,
) -> Naive:
    """Pair by pair. `weight` [draft_vocab, hidden] makes draft logits; `taught` says which pairs are learned from."""
    positions = len(weights)
    total = torch.zeros(())
    valid, losses, hits = ([0.0] * positions for _ in range(3))
    chains = []
    for number, document in enumerate(documents(batch)):
        assert isinstance(document.teacher, HiddenTeacher)
        (seq,) = document.lengths
        teacher_row = {int(t): i for i, (t,) in enumerate(document.loss_mask.nonzero())}
        states = [drafts(document, t) for t in range(seq)]
        hit = {}
        for t in range(seq):
            for i in range(min(positions, seq - t)):
                token = int(document.teacher_token[t + i])
                if not document.loss_mask[t + i] or token not in draft_tokens or not taught(number, i, t):
                    continue
                goal = document.teacher.hidden[teacher_row[t + i]]
                logits = frozen.logits(goal)

                def one(some: slice, logits: Tensor = logits) -> Teacher:
                    return teacher(logits[None, draft_tokens], logits.logsumexp(-1)[None])

                state = states[t][i]
                found = distill(state[None], weight, one, torch.tensor([0]), torch.ones(1), objective)
                loss = token_weight * found.loss_sum
                if feature_weight:
                    off = (state - goal).abs()
                    loss = loss + feature_weight * torch.where(off < 1, off**2 / 2, off - 0.5).mean()
                total = total + weights[i] * loss
                valid[i] += 1
                losses[i] += float(loss.detach())
                hit[i, t] = int(draft_tokens[found.draft_token]) == token
                hits[i] += hit[i, t]
        for t in range(seq - positions + 1):
            pairs = [(i, t) for i in range(positions)]
            if bool(document.loss_mask[t : t + positions].all()) and all(taught(number, *pair) for pair in pairs):
                chains.append([hit.get(pair, False) for pair in pairs])
    return Naive(total, valid, losses, hits, chains)


def check_loss(found: StepOutput, expected: Naive, head: nn.Module) -> None:
    """Every figure, and the gradient of every parameter."""
    assert found.valid.tolist() == expected.valid and found.valid[0] > 3
    assert found.hits.tolist() == expected.hits
    assert sorted(found.chain_hits.T.tolist()) == sorted(expected.chains)
    torch.testing.assert_close(found.losses, torch.tensor(expected.losses), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    parameters = dict(head.named_parameters())
    ours, theirs = (torch.autograd.grad(loss, list(parameters.values())) for loss in (found.loss, expected.loss))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert bool(other.any()), f"{name} is not trained"
        torch.testing.assert_close(
            one,
            other,
            atol=3e-5 * max(1.0, float(other.abs().max())),
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_packing(method: TrainableMethod, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> None:
    """Packed is the sum of each document alone."""
    packed, alone = method.loss(head, batch, frozen), [method.loss(head, one, frozen) for one in documents(batch)]
    total = torch.stack([one.loss for one in alone]).sum()
    torch.testing.assert_close(packed.loss, total, rtol=2e-6, atol=1e-9)
    for name in ("valid", "hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in alone)), name
    assert torch.equal(packed.chain_hits, torch.cat([one.chain_hits for one in alone], 1))
    parameters = list(head.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (packed.loss, total))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=3e-6 * max(1.0, float(other.abs().max())), rtol=1e-5)


def check_no_leak(method: TrainableMethod, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> None:
    """Tokens and features behind a row change no loss of what is taught up to it; those in front do."""
    (document,) = documents(batch)
    middle = document.lengths[0] // 2
    up_to = int(document.loss_mask[:middle].sum())
    mask = document.loss_mask.clone()
    mask[middle:] = False
    taught = HiddenTeacher(*(rows[:up_to] for rows in vars(document.teacher).values()))
    early = replace(document, loss_mask=mask, teacher=taught)

    def loss_with(features: slice, tokens: slice) -> float:
        other = replace(early, features=early.features.clone(), input_ids=early.input_ids.clone())
        other.features[features] *= -1.5
        other.input_ids[tokens] = (other.input_ids[tokens] + 7) % 300
        return float(method.loss(head, other, frozen).loss.detach())

    nothing = slice(0, 0)
    before = loss_with(nothing, nothing)
    assert before != 0
    assert loss_with(slice(middle, None), slice(middle, None)) == before
    assert loss_with(slice(0, 1), nothing) != before
    assert loss_with(nothing, slice(0, 1)) != before


def drafted_text(method: TrainableMethod, head: nn.Module, features: Tensor, length: int, depth: int) -> list[int]:
    """Tokens x_1.. of a text half of which the head itself drafted, so that it has chains that hit."""
    generator = torch.Generator().manual_seed(6)
    tokens = [4]
    drafter = method.drafter(head, CPU)
    while len(tokens) < length:
        drafter.start(1, 256)
        news = News(0, list(tokens), features[: len(tokens)])
        (tree,) = drafter.propose([news], Chain(depth=depth), DraftContext(depth))
        kept = int(torch.randint(depth + 1, (), generator=generator))
        tokens += [*tree.tokens.tolist()[:kept], 2 * int(torch.randint(150, (), generator=generator))]
    return tokens[:length]


@torch.no_grad()
def check_drafts_as_trained(method: TrainableMethod, head: nn.Module, frozen: FrozenHead, taps: int) -> None:
    """The leading hits of the loss at each row are those of a chain that is drafted there."""
    depth, seq = method.positions, 40
    batch = make_batch(frozen, (seq,), taps, trained=1.0)
    tokens = torch.tensor(drafted_text(method, head, batch.features, seq + 1, depth))
    batch = replace(batch, input_ids=tokens[:-1], teacher_token=tokens[1:], labels=tokens[1:])
    hits = method.loss(head, batch, frozen).chain_hits.long().cumprod(0).sum(0).tolist()
    assert len(hits) == seq - depth + 1
    drafter = method.drafter(head, CPU)
    found = []
    for t in range(seq - depth + 1):
        drafter.start(1, 256)
        news = News(0, tokens[: t + 1].tolist(), batch.features[: t + 1])
        (tree,) = drafter.propose([news], Chain(depth=depth), DraftContext(depth))
        text, drafts = tokens[t + 1 : t + 1 + depth].tolist(), tree.tokens.tolist()
        found.append(next((i for i in range(depth) if drafts[i] != text[i]), depth))
    assert found == hits
    assert depth in hits and 0 in hits


@torch.no_grad()
def check_batch_drafts_as_alone(method: TrainableMethod, head: nn.Module, policy: AnyTree, taps: int) -> None:
    """Sequences of different lengths, in changing company; one ends and another takes its slot. Also in passes of
    rounded sizes, which a GPU replays as graphs."""
    for graphs in (None, GraphRunner(CPU)):
        _check_batch(method, head, policy, taps, graphs)


def _check_batch(
    method: TrainableMethod, head: nn.Module, policy: AnyTree, taps: int, graphs: GraphRunner | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    features, tokens = torch.randn(4, 60, taps, generator=generator), torch.randint(300, (4, 60), generator=generator)
    #           slot, text, from, to
    calls = [
        [(0, 0, 0, 9), (1, 1, 0, 30), (2, 2, 0, 1)],
        [(0, 0, 9, 11), (1, 1, 30, 34), (2, 2, 1, 2)],
        [(0, 0, 11, 12), (2, 2, 2, 5)],
        [(0, 0, 12, 30), (1, 3, 0, 21), (2, 2, 5, 6)],
        [(1, 3, 21, 22), (2, 2, 6, 60)],
    ]
    together = method.drafter(head, CPU)
    assert isinstance(together, CachedDrafter)
    together.start(3, 80)
    together.graphs = graphs
    alone = {text: method.drafter(head, CPU) for text in range(4)}
    for drafter in alone.values():
        drafter.start(1, 80)
    for call in calls:
        for slot, _, start, _ in call:
            if start == 0:
                together.restart(slot)
        news = [News(slot, tokens[text, a:b].tolist(), features[text, a:b]) for slot, text, a, b in call]
        trees = together.propose(news, policy, DraftContext(9))
        for one, tree, (_, text, _, _) in zip(news, trees, call, strict=True):
            (expected,) = alone[text].propose([News(0, one.tokens, one.features)], policy, DraftContext(9))
            assert tree.tokens.tolist() == expected.tokens.tolist()
            assert tree.parents.tolist() == expected.parents.tolist()
            torch.testing.assert_close(tree.confidence, expected.confidence, atol=1e-5, rtol=1e-4)


# ---- by heart --------------------------------------------------------------------------------------------------------


def own_texts(target: Target, count: int, new: int) -> list[TokenSample]:
    """Greedy answers to random prompts of six tokens."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for i in range(count):
        ids = torch.randint(3, 290, (6,), generator=generator).tolist()
        ids += SpeculativeDecoder(target).generate(ids, new).token_ids
        samples.append(TokenSample(f"c{i}", ids, [False] * 6 + [True] * (len(ids) - 6)))
    return samples


def learn_by_heart(
    method: TrainableMethod, config: Any, target: Target, folder: Path, steps: int, **optimizer: object
) -> tuple[DraftHead, list[TokenSample]]:
    """A head that was trained on a few texts, read back from the disk, and the texts."""
    samples = own_texts(target, 4, 24)
    storing = ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128)
    extract(target, samples, method.feature_spec(target.spec), storing, folder / "features", NoProgress())
    fields: dict[str, Any] = {
        "steps": steps,
        "step_tokens": 256,
        "optimizer": optimizer,
        "precision": "fp32",
        "validation_conversations": 0,
        "parity": False,
    }
    training = TrainConfig(**fields)
    Trainer(FeatureStore(folder / "features"), method, config, training, folder / "run", 0).run(NoProgress(), "t", {})
    return load_head(folder / "run" / "head", target), samples


def check_by_heart(head: DraftHead, samples: list[TokenSample], target: Target, policy: AnyTree, least: float) -> None:
    """The texts come out as they are, three at a time, and most drafts are accepted."""
    decoder = SpeculativeDecoder(target, head, policy)
    new = [len(sample.input_ids) - 6 for sample in samples]
    params = [SamplingParams(max_new_tokens=count) for count in new]
    made = decoder.generate_batch([sample.input_ids[:6] for sample in samples], params, slots=3)
    assert [one.token_ids for one in made] == [sample.input_ids[6:] for sample in samples]
    lengths = [length for one in made for length in one.accepted_lengths[:-1]]  # the last pass is cut by the limit
    assert sum(lengths) / len(lengths) >= least, sum(lengths) / len(lengths)
