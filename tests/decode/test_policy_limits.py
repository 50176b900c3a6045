"""A policy beyond what a method drafts: refused where it was set, cut where it is a default."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drafts import Distribution, distribution, mostly_right
from hypothesis import given
from hypothesis import strategies as st

from sstf.decode import AnyPolicy, BanditPolicy, SpeculativeDecoder, refuse_beyond, within
from sstf.decode.adaptive import tree_policies
from sstf.errors import ConfigError
from sstf.evaluation import EvalConfig
from sstf.methods.base import DraftLimits
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, CostAwareTree, DynamicTree, StaticTree

CHAINS, SHORT = DraftLimits(trees=False), DraftLimits(depth=3)


def limited(limits: DraftLimits) -> DraftHead:
    head = distribution(mostly_right([], 300), 300)
    assert isinstance(head.method, Distribution)
    head.method.limits = limits
    return replace(head, name="tiny")


@pytest.mark.parametrize(
    ("limits", "policy", "said"),
    [
        (
            CHAINS,
            DynamicTree(),
            "policy is a dynamic tree, but head tiny drafts chains; expected kind: chain, any depth",
        ),
        (CHAINS, StaticTree.full(1), "policy is a static tree, but head tiny drafts chains"),
        (replace(SHORT, trees=False), CostAwareTree(), "expected kind: chain, a depth of 1 to 3"),
        (
            SHORT,
            Chain(depth=4),
            "policy has depth 4, but head tiny drafts 3 tokens at once; expected a depth of 1 to 3",
        ),
        (SHORT, StaticTree.full(2, 1, 1, 1), "policy has depth 4"),
        (SHORT, BanditPolicy(arms={"a": Chain(depth=3), "b": DynamicTree(depth=5)}), "policy.arms.b has depth 5"),
    ],
)
def test_refused_before_anything_is_drafted(
    limits: DraftLimits, policy: AnyPolicy, said: str, tiny_target: Target
) -> None:
    with pytest.raises(ConfigError) as refused:
        SpeculativeDecoder(tiny_target, limited(limits), policy)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("limits", "policy"),
    [
        (CHAINS, Chain(depth=64)),
        (CHAINS, Chain(lookup=True)),  # branches of the text are not the method's
        (SHORT, DynamicTree(depth=3)),
        (SHORT, BanditPolicy(arms={"a": Chain(depth=3), "b": StaticTree.full(4, 4)})),
        (DraftLimits(), DynamicTree(depth=64)),
    ],
)
def test_within_the_limits(limits: DraftLimits, policy: AnyPolicy, tiny_target: Target) -> None:
    assert SpeculativeDecoder(tiny_target, limited(limits), policy).policy == policy == within(limits, policy)


def test_the_default_is_cut(tiny_target: Target) -> None:
    assert SpeculativeDecoder(tiny_target, limited(DraftLimits(2))).policy == Chain(depth=2)
    assert SpeculativeDecoder(tiny_target, limited(DraftLimits())).policy == Chain()


TREES = st.one_of(
    st.builds(Chain, depth=st.integers(1, 9), lookup=st.booleans()),
    st.builds(DynamicTree, depth=st.integers(1, 9)),
    st.builds(CostAwareTree, depth=st.integers(1, 9), lookup=st.booleans()),
    st.lists(st.integers(1, 2), min_size=1, max_size=5).map(lambda widths: StaticTree.full(*widths)),
)
POLICIES = TREES | st.dictionaries(st.sampled_from("ab"), TREES, min_size=1).map(lambda arms: BanditPolicy(arms=arms))
LIMITS = st.builds(DraftLimits, depth=st.none() | st.integers(1, 9), trees=st.booleans())


@given(LIMITS, POLICIES)
def test_what_is_cut_is_never_refused_and_nothing_more_is_lost(limits: DraftLimits, policy: AnyPolicy) -> None:
    cut = within(limits, policy)
    refuse_beyond(limits, cut, "method m")
    type(cut).model_validate(cut.model_dump())  # as if it had been written
    for before, after in zip(tree_policies(policy), tree_policies(cut), strict=True):
        assert after.depth == min(before.depth, limits.depth or 99)
        assert after.lookup == before.lookup
        assert type(after) is (type(before) if limits.trees else Chain)
    try:
        refuse_beyond(limits, policy, "method m")
    except ConfigError:
        assert cut != policy
    else:
        assert cut == policy


def test_an_evaluation_of_a_method_that_drafts_chains() -> None:
    default = EvalConfig()
    assert default.fitted(DraftLimits(), "method m") is default
    assert default.fitted(CHAINS, "method m").policies == {"chain": Chain(depth=3)}
    short = default.fitted(DraftLimits(depth=2), "method m").policies
    assert short == {"chain": Chain(depth=2), "tree": DynamicTree(depth=2, top_k=4, total_tokens=12)}
    written = EvalConfig(policies=default.policies)
    with pytest.raises(ConfigError, match=r"eval\.policies\.tree is a dynamic tree, but method m drafts chains"):
        written.fitted(CHAINS, "method m")
