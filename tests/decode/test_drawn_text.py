"""At temperature > 0 the whole engine emits the target's distribution, whatever drafts and however drafts are drawn.

The target sees two tokens and no more (one layer with a window of two), so a text is a Markov chain: given the last two
tokens the next one has a known distribution, and every token of a long text is a draw that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drafts import Text, distribution
from test_engine import random_head
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from sstf.decode import AnyPolicy, BanditPolicy, SpeculativeDecoder, engine
from sstf.methods import Eagle3Config, EagleConfig, MedusaConfig, PEagleConfig
from sstf.methods.checkpoint import DraftHead
from sstf.methods.medusa import MedusaMethod
from sstf.targets import Target
from sstf.trees import Chain, DynamicTree, StaticTree, growth
from sstf.types import DraftTree, SamplingParams
from sstf.warping import warp

VOCAB = 8
PROMPT = [3, 7, 5]
TEMPERATURE, TOP_P, TOP_K = 1.1, 0.95, 4
NEW = 80
DRAWS = 3_500  # `test_a_wrong_engine_would_be_noticed` shows that so many tell

TREE = StaticTree.full(3, 2)
DYNAMIC = DynamicTree(depth=3, top_k=3, total_tokens=8)
POLICIES: dict[str, AnyPolicy] = {
    "plain": Chain(),  # without a head
    "chain-top": Chain(depth=3),
    "chain-iid": Chain(depth=3, draw="iid"),
    "tree-top": TREE,
    "tree-without-replacement": TREE.model_copy(update={"draw": "without_replacement"}),
    "tree-iid": TREE.model_copy(update={"draw": "iid"}),
    "dynamic": DYNAMIC,
    "calibrated": DYNAMIC.model_copy(update={"calibrated": True}),
    "lookup": DYNAMIC.model_copy(update={"lookup": True, "total_tokens": 5}),
    "bandit": BanditPolicy(
        arms={"drawn": TREE.model_copy(update={"draw": "iid"}), "chain": Chain(depth=2, draw="iid"), "top": DYNAMIC},
        half_life=15, dwell=2, margin=0.0,
    ),
}  # fmt: skip


@pytest.fixture
def markov(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    torch.manual_seed(7)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400, initializer_range=0.6, tie_word_embeddings=False,
        sliding_window=2, eos_token_id=None, pad_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return Target("markov", MistralForCausalLM(config), tokenizer)


def transitions(target: Target) -> Tensor:
    """[before, last, next], by transformers' forward; the texts in front differ, and do not matter."""
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    found = []
    for front in ([1, 2], [6, 6, 0]):
        ids = torch.cat([torch.tensor([front]).expand(len(pairs), -1), pairs], 1)
        with torch.inference_mode():
            found.append(warp(target.model(ids, use_cache=False).logits[:, -1], TEMPERATURE, TOP_P, TOP_K).double())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    return found[0].view(VOCAB, VOCAB, VOCAB)


@dataclass
class Found:
    counts: Tensor  # [before, last, next]
    accepted: float


def texts(decoder: SpeculativeDecoder, tokens: int, slots: int = 64) -> Found:
    """About `tokens` tokens, in texts of `NEW`."""
    number = -(-tokens // NEW)
    params = [SamplingParams(TEMPERATURE, TOP_P, TOP_K, NEW, seed) for seed in range(number)]
    counts = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    lengths: list[int] = []
    for found in decoder.generate_batch([PROMPT] * number, params, slots):
        whole = torch.tensor([*PROMPT[-2:], *found.token_ids])
        counts.index_put_((whole[:-2], whole[1:-1], whole[2:]), torch.ones(NEW, dtype=torch.float64), accumulate=True)
        lengths += found.accepted_lengths
    return Found(counts, sum(lengths) / len(lengths))


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square of all transitions, given the two tokens in front; cells expected fewer than 5 times count together
    within their row, and rows that then have one cell are left out."""
    expected = probs * counts.sum(-1, keepdim=True)
    statistic, freedom = 0.0, 0
    for wanted, seen in zip(expected.flatten(0, 1), counts.flatten(0, 1), strict=True):
        common = wanted >= 5
        cells = [*zip(seen[common].tolist(), wanted[common].tolist(), strict=True)]
        if float(wanted[~common].sum()) >= 5:
            cells.append((float(seen[~common].sum()), float(wanted[~common].sum())))
            total = 1.0
        else:  # without the rare ones, the others are compared among themselves
            kept_seen, kept = sum(s for s, _ in cells), sum(w for _, w in cells)
            total = kept_seen / kept if kept else 1.0
        if len(cells) > 1:
            statistic += sum((s - total * w) ** 2 / (total * w) for s, w in cells)
            freedom += len(cells) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def head_of(target: Target) -> DraftHead:
    return random_head(target, seed=0, spread=0.1, layers=(0,))


def impossible(found: Found, truth: Tensor) -> int:
    """Tokens that top-p or top-k had excluded."""
    return int(found.counts[truth == 0].sum())


def check(found: Found, truth: Tensor) -> None:
    assert impossible(found, truth) == 0
    assert p_value(found.counts, truth) > 1e-3


@pytest.mark.parametrize("name", ["chain-iid", "tree-without-replacement", "tree-iid", "dynamic"])
def test_medusa(name: str, markov: Target) -> None:
    """All nodes of a level share a distribution, of which each node's children are drawn anew."""
    torch.manual_seed(0)
    method = MedusaMethod(MedusaConfig(heads=3))
    head = method.build_head(markov.spec, markov.frozen_head, torch.arange(VOCAB))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    found = texts(SpeculativeDecoder(markov, DraftHead("medusa", method, head.eval()), POLICIES[name]), DRAWS)
    check(found, transitions(markov))
    assert found.accepted > 1.1


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy(name: str, markov: Target) -> None:
    decoder = SpeculativeDecoder(markov, None if name == "plain" else head_of(markov), POLICIES[name])
    truth = transitions(markov)
    assert float((truth == 0).double().mean()) > 0.2  # the bounds are at work
    found = texts(decoder, DRAWS)
    check(found, truth)
    assert found.accepted == 1 if name == "plain" else found.accepted > 1.1


@pytest.mark.parametrize("name", ["chain-iid", "tree-iid", "tree-without-replacement"])
def test_token_by_token(name: str, markov: Target) -> None:
    found = texts(SpeculativeDecoder(markov, head_of(markov), POLICIES[name], verification="token"), DRAWS)
    check(found, transitions(markov))
    assert found.accepted > 1.3


@pytest.mark.slow
def test_a_hundred_thousand_draws(markov: Target) -> None:
    found = texts(
        SpeculativeDecoder(markov, head_of(markov), StaticTree.full(2, 2, draw="without_replacement")), 100_000, 64
    )
    assert found.counts.sum() >= 100_000
    check(found, transitions(markov))


@pytest.mark.parametrize("name", ["chain-iid", "tree-without-replacement"])
@pytest.mark.parametrize(
    "config", [EagleConfig(), Eagle3Config(layers=(0,), num_layers=2), PEagleConfig(layers=(0,), depth=3)],
    ids=["eagle", "eagle3-2-layers", "p_eagle"],
)  # fmt: skip
def test_other_heads(config: Any, name: str, markov: Target) -> None:
    head = random_head(markov, seed=0, spread=0.1, config=config)
    found = texts(SpeculativeDecoder(markov, head, POLICIES[name]), DRAWS // 2)
    check(found, transitions(markov))
    assert found.accepted > 1.1


def test_one_by_one(markov: Target) -> None:
    found = texts(SpeculativeDecoder(markov, head_of(markov), POLICIES["tree-iid"]), 1_200, slots=1)
    check(found, transitions(markov))


def test_sequences_of_one_batch_have_temperatures_of_their_own(markov: Target) -> None:
    """Drafts are drawn at the first one's temperature; each text is still its own."""
    decoder = SpeculativeDecoder(markov, head_of(markov), StaticTree.full(3, 2, draw="without_replacement"))
    mine = SamplingParams(TEMPERATURE, TOP_P, TOP_K, NEW)
    others = [SamplingParams(2.0, 1.0, 0, NEW), SamplingParams(0.0, 1.0, 0, NEW), SamplingParams(0.3, 0.6, 2, NEW)]
    params = [SamplingParams(p.temperature, p.top_p, p.top_k, NEW, seed) for seed in range(20) for p in [*others, mine]]
    answers = decoder.generate_batch([PROMPT] * len(params), params, slots=9)
    greedy = SpeculativeDecoder(markov).generate(PROMPT, NEW).token_ids
    counts = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    for one, found in zip(params, answers, strict=True):
        if one.temperature == 0:
            assert found.token_ids == greedy
        elif one.temperature == TEMPERATURE:
            whole = [*PROMPT[-2:], *found.token_ids]
            for a, b, c in zip(whole, whole[1:], whole[2:], strict=False):
                counts[a, b, c] += 1
    check(Found(counts, 0), transitions(markov))


# ---- what is wrong is noticed ----------------------------------------------------------------------------------------


def wrong_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts drawn at another temperature than `draft_probs` says."""
    right = growth._draw_children
    monkeypatch.setattr(growth, "_draw_children", lambda probs, *rest: right(probs**4, *rest))


def target_without_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "warp", lambda logits, temperature, top_p, top_k: warp(logits, temperature, top_p))


def kept_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn children that turned out unlikely are not verified."""
    right = growth._drawn

    def pruned(*args: Any) -> list[DraftTree]:
        trees = right(*args)
        return [growth.prune(tree, (tree.confidence > 0.3).tolist()) for tree in trees]  # type: ignore[operator]

    monkeypatch.setattr(growth, "_drawn", pruned)


def next_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence of a batch is verified by its neighbour's logits."""
    right = engine.Session._warp
    monkeypatch.setattr(engine.Session, "_warp", staticmethod(lambda s, logits: right(s, logits.roll(1, 0))))


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (wrong_temperature, "chain-iid"),
        (wrong_temperature, "tree-without-replacement"),
        (target_without_top_k, "dynamic"),
        (kept_by_value, "tree-iid"),
        (next_rows, "dynamic"),
    ],
)
def test_a_wrong_engine_would_be_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], name: str, markov: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = transitions(markov)
    mutant(monkeypatch)
    found = texts(SpeculativeDecoder(markov, head_of(markov), POLICIES[name]), DRAWS)
    assert impossible(found, truth) > 50 or p_value(found.counts, truth) < 1e-6


# ---- the draft is the target -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verification", ["sequence", "token"])
@pytest.mark.parametrize("slots", [1, 5])
def test_drafts_drawn_from_the_target_itself_are_all_accepted(slots: int, verification: Any, markov: Target) -> None:
    def next_logits(text: Text) -> Tensor:
        with torch.inference_mode():
            found: Tensor = markov.model(torch.tensor([[PROMPT[0], *text]]), use_cache=False).logits[0, -1]
        return found

    depth, new = 4, 31
    head = distribution(next_logits, VOCAB)
    for draw in ("iid", "without_replacement"):
        decoder = SpeculativeDecoder(markov, head, Chain(depth=depth, draw=draw), verification)
        params = [SamplingParams(TEMPERATURE, TOP_P, TOP_K, new, seed) for seed in range(10)]
        for found in decoder.generate_batch([PROMPT] * 10, params, slots):
            assert found.accepted_lengths == [depth + 1] * 6  # 30 tokens behind the first
