"""Greedy decoding says what transformers' own `generate` says, token for token in float32, whatever drafts, alone and
in a batch: 64 prompts of 1 to 128 tokens, up to 128 new ones, dealt to the kinds of drafts."""

from __future__ import annotations

import itertools

import pytest
import torch
from drafts import distribution, mostly_right, prompts_of_equal_lengths, transformers_answers
from test_engine import random_head

from sstf.decode import AnyPolicy, BanditPolicy, Experience, SpeculativeDecoder
from sstf.decode.cost import KNOTS, CostModel
from sstf.methods import Eagle3Config, EagleConfig, NgramConfig, PEagleConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, CostAwareTree, DynamicTree, StaticTree
from sstf.types import SamplingParams

NEW = 128
SLOTS = 7
LIMITS = (128, 33, 1, 100, 2, 57, 128, 3)  # new tokens of prompts that share a batch
Pairs = list[tuple[list[int], list[int]]]

CHAIN, DYNAMIC = Chain(depth=4), DynamicTree(depth=4, top_k=4, total_tokens=12)
STATIC = StaticTree(
    paths=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 0, 0))
)
COST_AWARE = CostAwareTree(depth=5, top_k=3, total_tokens=16)
LOOKUP_CHAIN, LOOKUP_TREE = CHAIN.model_copy(update={"lookup": True}), DYNAMIC.model_copy(update={"lookup": True})
ARMS = {"chain": CHAIN, "static": STATIC, "dynamic": DYNAMIC, "cost": COST_AWARE, "lookup": LOOKUP_TREE}


def bandit(algorithm: str) -> BanditPolicy:
    # A short memory and a short dwell: all arms come up again and again, so their drafts take over from each other.
    return BanditPolicy.model_validate(
        {"arms": {name: arm.model_dump() for name, arm in ARMS.items()}, "algorithm": algorithm, "half_life": 15,
         "dwell": 2, "margin": 0.0}
    )  # fmt: skip


# What drafts (`told` knows most of the answer), and how.
KINDS: dict[str, tuple[str, AnyPolicy | None]] = {
    "plain": ("none", None),
    "chain": ("told", CHAIN),
    "static": ("told", STATIC),
    "dynamic": ("told", DYNAMIC),
    "calibrated": ("told", DYNAMIC.model_copy(update={"calibrated": True})),
    "cost-aware": ("told", COST_AWARE),
    "lookup-chain": ("told", LOOKUP_CHAIN),
    "lookup-tree": ("told", LOOKUP_TREE),
    "thompson": ("told", bandit("thompson")),
    "ucb": ("told", bandit("ucb")),
    "ngram": ("ngram", Chain(depth=6)),
    "eagle-static": ("eagle", STATIC),
    "eagle-wide": ("eagle", DynamicTree(depth=2, top_k=12, total_tokens=40)),
    "eagle-cost-aware-lookup": ("eagle", COST_AWARE.model_copy(update={"lookup": True})),
    "eagle-bandit": ("eagle", bandit("thompson")),
    "eagle1-dynamic": ("eagle1", DYNAMIC),
    "layers-static": ("layers", STATIC),
    "p-eagle-dynamic": ("p-eagle", DYNAMIC),
}


@pytest.fixture(scope="module")
def pairs(tiny_target: Target) -> Pairs:
    """Prompts with transformers' own greedy continuations."""
    prompts = prompts_of_equal_lengths((1, 2, 3, 9, 20, 40, 77, 128), each=8, seed=21)
    found = list(zip(prompts, transformers_answers(tiny_target, prompts, NEW), strict=True))
    ended = [answer for _, answer in found if len(answer) < NEW]
    assert ended and all(answer[-1] in tiny_target.end_tokens for answer in ended)
    # The best token is ahead of the second by far more than float32 rounds, or identity would be luck.
    margins = []
    for prompt, answer in found:
        with torch.inference_mode():
            logits = tiny_target.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    assert min(margins) > 3e-5
    return found


def decoder_of(kind: str, target: Target, pairs: Pairs, slots: int) -> SpeculativeDecoder:
    drafts, policy = KINDS[kind]
    head = {
        "none": lambda: None,
        "told": lambda: distribution(mostly_right(pairs, 300), 300),
        "ngram": lambda: DraftHead("ngram", build_method(NgramConfig(min_n=1))),
        "eagle": lambda: random_head(target),
        "eagle1": lambda: random_head(target, config=EagleConfig()),
        "layers": lambda: random_head(target, config=Eagle3Config(num_layers=2)),
        "p-eagle": lambda: random_head(target, config=PEagleConfig(depth=4)),
    }[drafts]()
    experience = Experience()
    if drafts in ("none", "told", "ngram"):  # the others measure
        # 1 ms and 20 us a row, 50 us a level: a tree of some size pays.
        for size in {1, 2, 4, slots}:
            experience.costs[size] = CostModel([1e-3 + 2e-5 * knot for knot in KNOTS], draft_s=5e-5, host_s=1e-4)
    return SpeculativeDecoder(target, head, policy, experience=experience)


def check_lengths(kind: str, lengths: list[int], decoder: SpeculativeDecoder, slots: int) -> None:
    drafts, policy = KINDS[kind]
    if drafts == "none":
        assert set(lengths) == {1}
    elif drafts == "told":
        assert len(set(lengths)) >= 4 and sum(lengths) > 1.3 * len(lengths)
    elif drafts == "ngram" or kind == "eagle-wide":
        assert max(lengths) > 1
    if isinstance(policy, BanditPolicy):
        played = decoder.experience.bandit(policy, slots)
        assert played.switches >= 5
        assert set(played.passes) == {*ARMS, "plain"} and min(played.passes.values()) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one(kind: str, tiny_target: Target, pairs: Pairs) -> None:
    """Every 16th prompt for each kind, other ones for the next kind: all 64 come up."""
    some = pairs[list(KINDS).index(kind) % 16 :: 16]
    decoder = decoder_of(kind, tiny_target, pairs, 1)
    lengths: list[int] = []
    for prompt, answer in some:
        found = decoder.generate(prompt, NEW)
        assert found.token_ids == answer
        assert sum(found.accepted_lengths) == len(answer) - 1
        assert found.ended == ("length" if len(answer) == NEW else "end")
        lengths += found.accepted_lengths
    check_lengths(kind, lengths, decoder, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_batch(kind: str, tiny_target: Target, pairs: Pairs) -> None:
    """In slots that are used again and again, beside prompts of other lengths and limits: half of the prompts, or
    a quarter of them where a real head drafts, which takes longer."""
    decoder = decoder_of(kind, tiny_target, pairs, SLOTS)
    count = 32 if KINDS[kind][0] in ("none", "told", "ngram") else 16
    shuffled = [pairs[(i * 27) % 64] for i in range(count)]  # 27 and 64 have no common factor
    limits = list(itertools.islice(itertools.cycle(LIMITS), count))
    found = decoder.generate_batch(
        [prompt for prompt, _ in shuffled], [SamplingParams(max_new_tokens=limit) for limit in limits], SLOTS
    )
    lengths: list[int] = []
    for (_, answer), limit, one in zip(shuffled, limits, found, strict=True):
        assert one.token_ids == answer[:limit]
        assert sum(one.accepted_lengths) == len(one.token_ids) - 1
        assert one.ended == ("end" if one.token_ids[-1] in tiny_target.end_tokens else "length")
        lengths += one.accepted_lengths
    check_lengths(kind, lengths, decoder, SLOTS)
