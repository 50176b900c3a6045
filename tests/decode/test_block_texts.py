"""Block drafters decode what the plain target says: token for token when greedy, in distribution when sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafts import prompts_of_equal_lengths
from test_drawn_text import DRAWS, check, markov, texts, transitions  # noqa: F401 - a fixture among them

from sstf.decode import SpeculativeDecoder
from sstf.errors import ConfigError
from sstf.methods import DFlashConfig, DominoConfig, DSparkConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, DynamicTree, StaticTree
from sstf.types import SamplingParams

KINDS: dict[str, type[Any]] = {"dflash": DFlashConfig, "domino": DominoConfig, "dspark": DSparkConfig}
GREEDY: dict[str, AnyTree] = {
    "chain": Chain(depth=4),
    "static": StaticTree.full(3, 2, 1),
    "dynamic": DynamicTree(depth=4, top_k=4, total_tokens=12),
    "wide": DynamicTree(depth=2, top_k=12, total_tokens=40),
    "lookup": DynamicTree(depth=4, top_k=4, total_tokens=12, lookup=True),
}
DRAWN: dict[str, AnyTree] = {
    "chain-iid": Chain(depth=3, draw="iid"),
    "tree-without-replacement": StaticTree.full(3, 2, draw="without_replacement"),
    "dynamic": DynamicTree(depth=3, top_k=3, total_tokens=8),
}


def random_head(config: Any, target: Target, spread: float) -> DraftHead:
    method: Any = build_method(config)
    torch.manual_seed(0)
    size = target.spec.vocab_size
    head = method.build_head(target.spec, target.frozen_head, torch.arange(0, size, 2 if size > 100 else 1))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return DraftHead("random", method, head.eval())


@pytest.mark.parametrize("policy", GREEDY)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_plain_targets(kind: str, policy: str, tiny_target: Target) -> None:
    """Eight prompts of 1 to 50 tokens in three slots, and one alone."""
    config = KINDS[kind](block_size=5, num_layers=2, layers=(1, 4))
    decoder = SpeculativeDecoder(tiny_target, random_head(config, tiny_target, 0.15), GREEDY[policy])
    prompts = prompts_of_equal_lengths((1, 3, 20, 50), each=2, seed=5)
    params = [SamplingParams(max_new_tokens=limit) for limit in (25, 7, 1, 18) * 2]
    plain = SpeculativeDecoder(tiny_target).generate_batch(prompts, params, 3)
    found = decoder.generate_batch(prompts, params, 3)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    if policy in ("wide", "lookup"):
        assert max(length for one in found for length in one.accepted_lengths) > 1
    assert decoder.generate(prompts[4], params[4].max_new_tokens).token_ids == plain[4].token_ids


@pytest.mark.parametrize("policy", DRAWN)
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_text_has_the_targets_distribution(kind: str, policy: str, markov: Target) -> None:  # noqa: F811
    config = KINDS[kind](block_size=4, num_layers=1, layers=(0,))
    decoder = SpeculativeDecoder(markov, random_head(config, markov, 0.3), DRAWN[policy])
    found = texts(decoder, DRAWS)
    check(found, transitions(markov))
    assert found.accepted > 1.1


def test_no_policy_is_deeper_than_a_block(tiny_target: Target) -> None:
    """Of 5 slots DFlash fills in 4; in DSpark's all predict."""
    shape = {"block_size": 5, "num_layers": 1, "layers": (1, 4)}
    for kind, drafts in (("dflash", 4), ("domino", 4), ("dspark", 5)):
        head = random_head(KINDS[kind](**shape), tiny_target, 0.15)
        SpeculativeDecoder(tiny_target, head, Chain(depth=drafts))
        with pytest.raises(ConfigError, match=f"drafts {drafts} tokens at once; expected a depth of 1 to {drafts}"):
            SpeculativeDecoder(tiny_target, head, DynamicTree(depth=drafts + 1))
