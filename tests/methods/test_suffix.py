from __future__ import annotations

import itertools
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sstf.decode import SpeculativeDecoder
from sstf.features import FeatureSpec
from sstf.methods import DraftMethod, SuffixConfig, TrainableMethod, build_method
from sstf.methods.base import DraftLimits, News
from sstf.methods.checkpoint import DraftHead
from sstf.methods.suffix import DEEPEST, Memory, SuffixCounts, SuffixDrafter, grown, widths
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, CostAwareTree, DraftContext, DynamicTree, StaticTree, children
from sstf.types import DraftTree, SamplingParams

CPU = torch.device("cpu")
Texts = list[list[int]]
TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4)


def counted(texts: Texts, longest: int = 99) -> SuffixCounts:
    made = SuffixCounts(longest)
    for text in texts:
        made.begin()
        for token in text:
            made.append(token)
    return made


def occurrences(texts: Texts) -> Counter[tuple[int, ...]]:
    """Of every string, by looking at every place."""
    return Counter(
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def places(texts: Texts, string: tuple[int, ...]) -> set[tuple[int, int]]:
    n = len(string)
    return {
        (number, end)
        for number, text in enumerate(texts)
        for end in range(n, len(text) + 1)
        if tuple(text[end - n : end]) == string
    }


# ---- counting --------------------------------------------------------------------------------------------------------


@given(TEXTS, st.lists(st.integers(0, 2), max_size=12))
@settings(deadline=None)
def test_matches_and_counts_as_by_looking_everywhere(texts: Texts, tail: list[int]) -> None:
    made, naive = counted(texts), occurrences(texts)
    assert made.size == sum(map(len, texts)) and len(made.next) <= 2 * made.size + 1
    expected = []  # the longest suffix of each set of places, where some token follows
    seen: list[set[tuple[int, int]]] = []
    for length in range(len(tail), 0, -1):
        string = tuple(tail[-length:])
        here = places(texts, string)
        if here and here not in seen:
            seen.append(here)
            behind = {token: naive[(*string, token)] for token in range(3) if (*string, token) in naive}
            if behind:
                expected.append((length, behind))
    found = [
        (length, {token: made.count[other] for token, other in made.next[state].items()})
        for length, state in made.matches(tail)
    ]
    assert found == expected


@given(TEXTS, st.integers(1, 6))
@settings(deadline=None)
def test_strings_up_to_a_length_are_counted_all_the_same(texts: Texts, longest: int) -> None:
    made, naive = counted(texts, longest), occurrences(texts)
    for string, number in naive.items():
        state = 0
        for token in string:
            state = made.next[state][token]
        if len(string) <= longest:
            assert made.count[state] == number


@given(TEXTS)
@settings(deadline=None)
def test_shares_and_order_of_continuations(texts: Texts) -> None:
    """By count; of equals, what stood there last."""
    made, naive = counted(texts), occurrences(texts)
    whole = [(number, end) for number, text in enumerate(texts) for end in range(1, len(text) + 1)]
    for string in [(), *naive]:
        state = 0
        for token in string:
            state = made.next[state][token]
        behind = {token: naive[(*string, token)] for token in range(3) if (*string, token) in naive}
        latest = {token: whole.index(max(places(texts, (*string, token)))) for token in behind}
        order = sorted(behind, key=lambda token: (-behind[token], -latest[token]))
        found = made.continuations(state, 2)
        assert [token for _, token, _ in found] == order[:2]
        assert [share for share, _, _ in found] == [behind[t] / sum(behind.values()) for t in order[:2]]


def test_a_token_costs_the_same_in_a_long_text_and_in_one_that_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    for text in (torch.randint(50, (40_000,), generator=generator).tolist(), [7] * 40_000, [1, 2, 3] * 13_000):
        made, times = SuffixCounts(32), []
        for part in (text[:10_000], text[10_000:30_000], text[30_000:]):
            started = time.perf_counter()
            for token in part:
                made.append(token)
            times.append((time.perf_counter() - started) / len(part))
        assert times[2] < 4 * times[0]
        assert len(made.next) <= 2 * len(text)


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12), st.integers(0, 20))
def test_memory_keeps_the_latest_answers_and_no_more_than_it_may(answers: Texts, tokens: int) -> None:
    memory = Memory(tokens, 20)
    for answer in answers:
        memory.add(answer)
    assert memory.young.size + memory.old.size <= tokens
    half = tokens // 2
    young: Texts = []
    old: Texts = []
    for answer in answers:
        answer = answer[len(answer) - min(len(answer), half) :]
        if sum(map(len, young)) + len(answer) > half:
            young, old = [], young
        young.append(answer)
    for made, texts in ((memory.young, young), (memory.old, old)):
        assert {token: made.count[state] for token, state in made.next[0].items()} == Counter(itertools.chain(*texts))
    if answers and answers[-1] and tokens >= 18:
        assert memory.young.next[0], "the last answer is there"


# ---- drafting --------------------------------------------------------------------------------------------------------


def propose(pieces: Texts, policy: AnyTree, **changes: float) -> DraftTree:
    """The tree after tokens that arrived in these pieces."""
    drafter = build_method(SuffixConfig.model_validate({"factor": 9.0} | changes)).drafter(None, CPU)
    drafter.start(1, 64)
    for piece in pieces:
        (tree,) = drafter.propose([news(piece)], policy, DraftContext(64))
    return tree


def news(tokens: list[int], slot: int = 0) -> News:
    return News(slot, tokens, torch.empty(len(tokens), 0))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),  # 1 2 stood before, followed by 3 4 5
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # twice 3, once 4; then 8 was the later one
        ([1, 2, 3, 4], []),
        ([1], []),
        ([5, 5, 5], [5, 5]),  # behind the first 5; a match of two promises one
        ([3, 1, 3], [1, 3]),
    ],
)
def test_chains_by_hand(history: list[int], expected: list[int]) -> None:
    tree = propose([history], Chain(depth=3))
    assert tree.tokens.tolist() == expected and tree.parents.tolist() == list(range(-1, len(expected) - 1))


def test_a_tree_by_hand() -> None:
    """Behind `1 2` stood 3 twice and 4 once; behind 1 2 3: 9 once and 8 once."""
    history = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]
    tree = propose([history], DynamicTree(depth=2, top_k=2, total_tokens=5))
    assert tree.tokens.tolist() == [3, 4, 8, 9, 7]  # 4 is as likely as 8 and 9, and was there first
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1]
    assert tree.confidence is not None
    assert tree.confidence.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2, 1 / 2, 1])
    small = propose([history], DynamicTree(depth=2, top_k=1, total_tokens=5))
    assert (small.tokens.tolist(), small.parents.tolist()) == ([3, 8], [-1, 0])
    static = propose([history], StaticTree(paths=((0,), (1,), (1, 0))))
    assert (static.tokens.tolist(), static.parents.tolist()) == ([3, 4, 7], [-1, -1, 1])
    likely = propose([history], DynamicTree(depth=2, top_k=2, total_tokens=5), min_chance=0.34)
    assert likely.tokens.tolist() == [3]
    assert len(propose([history], CostAwareTree(total_tokens=3))) == 3


def test_longer_matches_draft_more() -> None:
    text = [*range(10, 40)]
    for match in (1, 2, 5):
        tree = propose([[*text, 99, *text[:match]]], Chain(depth=64), factor=2.0)
        assert tree.tokens.tolist() == text[match : match + 2 * match]
    assert len(propose([[*text, 99, text[0]]], Chain(depth=64), factor=0.9)) == 0


def naive_best(text: list[int], policy: AnyTree, config: SuffixConfig) -> tuple[float, int]:
    """Score and size of the best tree over all matches, with every node of every tree looked at."""
    naive = occurrences([text])
    width = widths(policy)
    best = (0.0, 0)
    for length in range(1, min(len(text), config.max_match) + 1):
        match = tuple(text[-length:])
        size = min(int(config.factor * length), policy.total_tokens)
        nodes: list[float] = []

        def visit(string: tuple[int, ...], chance: float, path: tuple[int, ...], nodes: list[float] = nodes) -> None:
            behind = {t: naive[(*string, t)] for t in range(3) if (*string, t) in naive}
            latest = {t: max(places([text], (*string, t))) for t in behind}
            order = sorted(behind, key=lambda t: (-behind[t], -latest[t][1]))
            for rank, token in enumerate(order[: width(path)] if len(path) < policy.depth else ()):
                product = chance * behind[token] / sum(behind.values())
                if product >= config.min_chance:
                    nodes.append(product)
                    visit((*string, token), product, (*path, rank))

        visit(match, 1.0, ())
        nodes = sorted(nodes, reverse=True)[:size]
        best = max(best, (sum(nodes), len(nodes)), key=lambda found: found[0])
    return best


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=25),
    st.sampled_from(
        [Chain(depth=4), DynamicTree(depth=3, top_k=2, total_tokens=6), StaticTree(paths=((0,), (1,), (1, 0)))]
    ),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.data(),
)
@settings(deadline=None)
def test_the_best_tree_however_the_tokens_arrive(
    text: list[int], policy: AnyTree, factor: float, data: st.DataObject
) -> None:
    config = SuffixConfig(factor=factor, max_match=8, min_chance=0.05)
    score, _ = naive_best(text, policy, config)
    tree = propose([text], policy, factor=factor, max_match=8, min_chance=0.05)
    parents, shares = tree.parents.tolist(), [] if tree.confidence is None else tree.confidence.tolist()
    products: list[float] = []
    depth: list[int] = []
    for parent, share in zip(parents, shares, strict=True):
        assert parent < len(products)
        depth.append(depth[parent] + 1 if parent >= 0 else 1)
        products.append(share * (products[parent] if parent >= 0 else 1.0))
    assert sum(products) == pytest.approx(score)
    assert len(tree) <= policy.total_tokens and max(depth, default=0) <= policy.depth
    for siblings in children(parents).values():
        assert [shares[i] for i in siblings] == sorted((shares[i] for i in siblings), reverse=True)
        assert len({int(tree.tokens[i]) for i in siblings}) == len(siblings)
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=3))})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    again = propose(pieces, policy, factor=factor, max_match=8, min_chance=0.05)
    assert torch.equal(again.tokens, tree.tokens) and torch.equal(again.parents, tree.parents)


def test_counts_reach_as_deep_as_any_policy() -> None:
    """A continuation below the longest match is still counted: nothing is divided by zero."""
    text = [*range(100), *range(32)]
    tree = propose([text], Chain(depth=64), max_match=32, factor=2.0)
    assert tree.tokens.tolist() == [*range(32, 96)]
    made = counted([text], 32 + DEEPEST)
    (length, state), *_ = made.matches(text[-32:])
    assert length == 32
    assert grown(made, state, 999, DEEPEST, widths(Chain()), 0.0).score == DEEPEST


def drafter_of(**changes: object) -> SuffixDrafter:
    drafter = SuffixDrafter(SuffixConfig.model_validate({"factor": 9.0} | changes), CPU)
    drafter.start(2, 64)
    return drafter


def chain_of(drafter: SuffixDrafter, tokens: list[int], slot: int = 0) -> list[int]:
    (tree,) = drafter.propose([news(tokens, slot)], Chain(depth=3), DraftContext(64))
    found: list[int] = tree.tokens.tolist()
    return found


def test_earlier_answers_are_remembered_and_prompts_are_not() -> None:
    drafter = drafter_of()
    assert chain_of(drafter, [50, 51, 52, 1]) == []  # a prompt, but for its first token, and the answer's first
    assert chain_of(drafter, [2, 3, 4]) == []
    assert chain_of(drafter, [9, 1, 2], slot=1) == []  # not before the answer is complete
    drafter.restart(0)
    assert chain_of(drafter, [1, 2], slot=1) == [1, 2]  # its own text comes first
    drafter.restart(1)
    assert chain_of(drafter, [8, 1, 2], slot=1) == [3, 4]
    assert chain_of(drafter, [50], slot=1) == []
    drafter.start(1, 64)  # another session
    assert chain_of(drafter, [7, 1, 2, 3]) == [4]
    forgetful = drafter_of(remember=0)
    chain_of(forgetful, [5, 1, 2, 3, 4])
    forgetful.restart(0)
    assert chain_of(forgetful, [6, 1, 2]) == []


def test_reads_no_features_and_learns_nothing(tiny_target: Target) -> None:
    method = build_method(SuffixConfig())
    assert method.feature_spec(tiny_target.spec) == FeatureSpec(())
    assert method.limits == DraftLimits()
    assert isinstance(method, DraftMethod) and not isinstance(method, TrainableMethod)
    for wrong in ({"max_match": 0}, {"factor": 0}, {"min_chance": 1.5}, {"remember": -1}):
        with pytest.raises(ValidationError):
            SuffixConfig.model_validate(wrong)


@pytest.mark.parametrize(
    "policy",
    [Chain(depth=6), StaticTree.full(2, 2, 1), DynamicTree(depth=5, top_k=3, total_tokens=12, lookup=True)],
)
def test_greedy_text_is_the_targets(policy: AnyTree, tiny_target: Target) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() * 3 for n in (1, 7, 20)]
    prompts += prompts[:2]  # that were answered before
    expected = [SpeculativeDecoder(tiny_target).generate(prompt, 40).token_ids for prompt in prompts]
    decoder = SpeculativeDecoder(tiny_target, DraftHead("suffix", build_method(SuffixConfig())), policy)
    made = decoder.generate_batch(prompts, SamplingParams(max_new_tokens=40), slots=2)
    assert [one.token_ids for one in made] == expected
    assert max(length for one in made for length in one.accepted_lengths) > 2
    again = decoder.generate(prompts[2], 40)  # all of it is remembered now
    assert again.token_ids == expected[2]
    assert len(again.accepted_lengths) < len(made[2].accepted_lengths)
