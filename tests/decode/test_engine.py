from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sstf.decode import Generation, SpeculativeDecoder, Verified, engine, verify_deterministic
from sstf.decode.verify import draw
from sstf.errors import DecodeError
from sstf.features import FeatureSpec
from sstf.methods import Eagle3Config, NgramConfig, build_method
from sstf.methods.base import DraftLimits, News, ShallowPasses
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target, TargetSpec
from sstf.trees import Chain, DraftContext, DynamicTree, children
from sstf.types import DraftTree, SamplingParams
from sstf.warping import warp

NEW = 13
CPU = torch.device("cpu")
TREE = DynamicTree(depth=4, top_k=4, total_tokens=12)


def make_prompts(count: int = 32) -> list[list[int]]:
    """Of 1 to 40 tokens; every fourth repeats itself, so that prompt lookup has something to find."""
    generator = torch.Generator().manual_seed(11)
    prompts = []
    for i in range(count):
        ids = torch.randint(3, 300, (1 + (i * 7) % 40,), generator=generator).tolist()
        prompts.append(ids[:9] * 4 if i % 4 == 0 else ids)
    return prompts


@pytest.fixture(scope="module")
def expected(tiny_target: Target) -> list[tuple[list[int], list[int]]]:
    """Prompts with transformers' own greedy continuations."""
    pairs = []
    for prompt in make_prompts():
        ids = torch.tensor([prompt])
        out = tiny_target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        pairs.append((prompt, out[0, len(prompt) :].tolist()))
    assert {len(answer) for _, answer in pairs} - {NEW}, "no answer ends before the limit: change the seed"
    return pairs


def random_head(
    target: Target, seed: int = 0, spread: float = 0.15, layers: tuple[int, ...] | None = None, config: Any = None
) -> DraftHead:
    method = build_method(config or Eagle3Config(layers=layers))
    torch.manual_seed(seed)
    size = target.spec.vocab_size
    head = method.build_head(target.spec, target.frozen_head, torch.arange(0, size, 2 if size > 100 else 1))  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return DraftHead("random", method, head.eval())


# ---- drafters whose proposals are known ------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A method that proposes `make(tokens so far, policy)`, and records what it was handed."""

    make: Callable[[list[int], Chain | DynamicTree], DraftTree]
    layers: tuple[int, ...] = ()
    levels: int = 1
    shared_layers: int = 0
    history: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    limits: DraftLimits = field(default_factory=DraftLimits)

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        return FeatureSpec(self.layers)

    def drafter(self, head: nn.Module | None, device: torch.device) -> Scripted:
        return self

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        self.history, self.features = [], []

    def restart(self, slot: int) -> None:
        assert slot == 0

    def propose(self, news: Sequence[News], policy: Chain | DynamicTree, context: DraftContext) -> list[DraftTree]:
        (one,) = news
        assert len(one.features) == len(one.tokens)
        self.history += one.tokens
        self.features.append(one.features)
        return [self.make(self.history, policy.model_copy(update={"depth": min(policy.depth, context.depth)}))]


def scripted(make: Callable[[list[int], Chain | DynamicTree], DraftTree], layers: tuple[int, ...] = ()) -> DraftHead:
    return DraftHead("scripted", Scripted(make, layers))


def chain(tokens: Sequence[int]) -> DraftTree:
    return DraftTree(torch.tensor(list(tokens), dtype=torch.int64), torch.arange(-1, len(tokens) - 1))


def oracle(answer: list[int], prompt: list[int]) -> Callable[[list[int], Chain | DynamicTree], DraftTree]:
    """The right continuation, as a chain."""
    whole = [*prompt[1:], *answer]
    return lambda history, policy: chain(whole[len(history) : len(history) + policy.depth])


def hidden_oracle(answer: list[int], prompt: list[int]) -> Callable[[list[int], Chain | DynamicTree], DraftTree]:
    """The right continuation as the LAST sibling of every level, behind wrong ones that have children of their own."""
    whole = [*prompt[1:], *answer]

    def make(history: list[int], policy: Chain | DynamicTree) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for right in whole[len(history) : len(history) + policy.depth]:
            wrong = (right + 1) % 300
            tokens += [wrong, right, right]  # a wrong one, the right one below the wrong one, the right one
            parents += [parent, len(parents), parent]
            parent = len(parents) - 1
        return DraftTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64))

    return make


def wrong(answer: list[int], prompt: list[int]) -> Callable[[list[int], Chain | DynamicTree], DraftTree]:
    whole = [*prompt[1:], *answer]
    return lambda history, policy: chain([(t + 1) % 300 for t in whole[len(history) : len(history) + policy.depth]])


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "chain", "dynamic", "wide", "ngram", "ngram-lookup"])
def test_greedy_says_what_transformers_says(
    kind: str, tiny_target: Target, expected: list[tuple[list[int], list[int]]]
) -> None:
    ngram = DraftHead("ngram", build_method(NgramConfig(min_n=1)))
    head, policy = {
        "plain": (None, None),
        "chain": (random_head(tiny_target), Chain(depth=3)),
        "dynamic": (random_head(tiny_target), TREE),
        "wide": (random_head(tiny_target, seed=1), DynamicTree(depth=2, top_k=60, total_tokens=200)),
        "ngram": (ngram, Chain(depth=5)),
        "ngram-lookup": (ngram, Chain(depth=2, lookup=True)),
    }[kind]
    decoder = SpeculativeDecoder(tiny_target, head, policy)
    accepted: list[int] = []
    for prompt, answer in expected:
        found = decoder.generate(prompt, NEW)
        assert found.token_ids == answer
        assert sum(found.accepted_lengths) == len(answer) - 1
        accepted += found.accepted_lengths
    if kind == "plain":
        assert set(accepted) == {1}
    elif kind != "chain":
        assert max(accepted) > 1  # otherwise no accepted branch was ever kept


@pytest.mark.parametrize(("make", "per_pass"), [(oracle, 4), (hidden_oracle, 4), (wrong, 1)])
def test_accepted_lengths_of_known_drafts(
    make: Callable[..., Any], per_pass: int, tiny_target: Target, expected: list[tuple[list[int], list[int]]]
) -> None:
    policy = DynamicTree(depth=3, top_k=8, total_tokens=9)
    for prompt, answer in expected:
        found = SpeculativeDecoder(tiny_target, scripted(make(answer, prompt)), policy).generate(prompt, NEW)
        assert found.token_ids == answer
        assert sum(found.accepted_lengths) == len(answer) - 1
        passes, rest = divmod(len(answer) - 1, per_pass)
        assert found.accepted_lengths == [per_pass] * passes + [rest] * (rest > 0)
        assert found.accepted_length == (len(answer) - 1) / max(1, passes + (rest > 0))


def test_drafter_gets_every_token_with_the_features_that_predicted_it(
    tiny_target: Target, expected: list[tuple[list[int], list[int]]]
) -> None:
    layers = (1, 6)
    for prompt, answer in expected[:6]:
        for make in (hidden_oracle, wrong):
            head = scripted(make(answer, prompt), layers)
            SpeculativeDecoder(tiny_target, head, DynamicTree(depth=3, total_tokens=9)).generate(prompt, NEW)
            method = head.method
            assert isinstance(method, Scripted)
            seen = method.history
            assert seen == [*prompt[1:], *answer][: len(seen)]
            assert len(seen) >= len(prompt) + len(answer) - 6  # up to the last pass or two
            ids = torch.tensor([[*prompt, *answer]])
            states = tiny_target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            rows = torch.cat([states[layer + 1][0] for layer in layers], -1)[: len(seen)]
            torch.testing.assert_close(torch.cat(method.features), rows, atol=1e-4, rtol=1e-4)


def test_end_token_inside_an_accepted_path(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompts()[2]
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    answer = SpeculativeDecoder(tiny_target, None).generate(prompt, NEW).token_ids
    stop = next(i for i in range(2, NEW) if answer[i] not in answer[:i] and i % 5 in (1, 2, 3))  # not at a path's end
    monkeypatch.setattr(Target, "end_tokens", frozenset({answer[stop]}))
    streamed: list[list[int]] = []
    decoder = SpeculativeDecoder(tiny_target, scripted(oracle(answer, prompt)), Chain(depth=4))
    found = decoder.generate(prompt, NEW, on_step=lambda step: streamed.append(step.tokens))
    assert (
        found.token_ids == answer[: stop + 1] == SpeculativeDecoder(tiny_target, None).generate(prompt, NEW).token_ids
    )
    passes, rest = divmod(stop, 5)
    assert found.accepted_lengths == [5] * passes + [rest]
    assert streamed[0] == answer[:1]
    assert [len(tokens) for tokens in streamed[1:]] == found.accepted_lengths
    assert [token for tokens in streamed for token in tokens] == found.token_ids


def test_end_token_first(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompts()[2]
    first = SpeculativeDecoder(tiny_target, None).generate(prompt, 1)
    assert len(first.token_ids) == 1 and first.accepted_lengths == [] and first.accepted_length == 0
    monkeypatch.setattr(Target, "end_tokens", frozenset(first.token_ids))
    assert SpeculativeDecoder(tiny_target, None).generate(prompt, NEW).token_ids == first.token_ids


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
def test_length_limit_inside_a_path(
    limit: int, tiny_target: Target, expected: list[tuple[list[int], list[int]]]
) -> None:
    prompt, answer = next(pair for pair in expected if len(pair[1]) == NEW)
    depths: list[int] = []
    tell = oracle(answer, prompt)

    def make(history: list[int], policy: Chain | DynamicTree) -> DraftTree:
        depths.append(policy.depth)
        return tell(history, policy)

    found = SpeculativeDecoder(tiny_target, scripted(make), Chain(depth=4)).generate(prompt, limit)
    assert found.token_ids == answer[:limit]
    assert sum(found.accepted_lengths) == limit - 1
    # Nothing is drafted that could not be emitted.
    assert depths == {1: [], 2: [], 3: [1], 6: [4], 7: [4]}[limit]


def test_to_the_very_end_of_the_context(tiny_target: Target) -> None:
    prompt = torch.randint(3, 300, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = SpeculativeDecoder(tiny_target, None).generate(prompt, 16)
    for policy in (TREE, Chain(depth=20)):
        assert (
            SpeculativeDecoder(tiny_target, random_head(tiny_target), policy).generate(prompt, 16).token_ids
            == plain.token_ids
        )


def test_a_prompt_in_any_of_its_forms(tiny_target: Target) -> None:
    decoder = SpeculativeDecoder(tiny_target, None)
    expected = decoder.generate([5, 6, 7], 4).token_ids
    for form in ((5, 6, 7), torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]], dtype=torch.int32)):
        assert decoder.generate(form, 4).token_ids == expected


def test_taps_are_removed(tiny_target: Target) -> None:
    hooks = [len(layer._forward_hooks) for layer in tiny_target.layers]
    SpeculativeDecoder(tiny_target, random_head(tiny_target)).generate([5], 4)
    with pytest.raises(ZeroDivisionError):
        SpeculativeDecoder(tiny_target, scripted(lambda *_: 1 // 0, (0,))).generate([5], 4)  # type: ignore[arg-type, return-value]
    assert [len(layer._forward_hooks) for layer in tiny_target.layers] == hooks


def test_eager_attention(
    tiny_target: Target, expected: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without SDPA adds the mask to its scores."""
    monkeypatch.setattr(tiny_target.model.config, "_attn_implementation", "eager")
    for prompt, answer in expected[:4]:
        head = scripted(hidden_oracle(answer, prompt))
        found = SpeculativeDecoder(tiny_target, head, DynamicTree(depth=3, total_tokens=9)).generate(prompt, NEW)
        assert found.token_ids == answer


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"input_ids": []}, r"input_ids has shape \[0\]; expected one sequence of at least one token"),
        ({"input_ids": torch.zeros(2, 3)}, r"input_ids has shape \[2, 3\]"),
        ({"input_ids": torch.tensor(3)}, r"input_ids has shape \[\]"),
        ({"input_ids": [3, 300]}, "ids outside the target's vocabulary of 300"),
        ({"input_ids": [-1]}, "ids outside the target's vocabulary of 300"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"max_new_tokens": 254}, "3 tokens and max_new_tokens is 254, together more than the target's context of 256"),
        ({"temperature": -0.1}, r"temperature is -0.1; expected 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a value in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_requests_out_of_range(request_: dict[str, Any], message: str, tiny_target: Target) -> None:
    with pytest.raises(DecodeError, match=message):
        SpeculativeDecoder(tiny_target, None).generate(**({"input_ids": [3, 4, 5], "max_new_tokens": 8} | request_))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("calls", "position"), [(0, 2), (1, 3), (2, 4)])
def test_logits_that_are_not_finite(
    value: float, calls: int, position: int, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 3: the prefill predicts from position 2, the passes behind it from 3 and on."""
    norm = tiny_target.decoder.norm
    count = 0

    def broken(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return output.fill_(value) if count == calls + 1 else output

    handle = norm.register_forward_hook(broken)
    try:
        monkeypatch.setattr(Target, "end_tokens", frozenset())
        with pytest.raises(DecodeError, match=rf"NaN or infinite logits at position {position}; check its weights"):
            SpeculativeDecoder(tiny_target, None).generate([5, 6, 7], 8)
    finally:
        handle.remove()


# ---- sampling --------------------------------------------------------------------------------------------------------

VOCAB = 12
TEMPERATURE, TOP_P = 0.8, 0.95
PROMPT = [3, 7, 5]
DRAWS = 2400


@pytest.fixture
def small(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return Target("small", LlamaForCausalLM(config), tokenizer)


def analytic(target: Target) -> Tensor:
    """Distribution of the three tokens behind PROMPT, by transformers' forward over all prefixes."""

    def after(prefixes: Tensor) -> Tensor:
        ids = torch.cat([torch.tensor([PROMPT]).expand(len(prefixes), -1), prefixes], 1)
        with torch.inference_mode():
            return warp(target.model(ids, use_cache=False).logits[:, -1], TEMPERATURE, TOP_P).double()

    tokens = torch.arange(VOCAB)
    first = after(torch.empty(1, 0, dtype=torch.int64))[0]
    second = after(tokens[:, None])
    third = after(torch.cartesian_prod(tokens, tokens)).view(VOCAB, VOCAB, VOCAB)
    return first[:, None, None] * second[:, :, None] * third


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square, cells expected fewer than 10 times taken together."""
    expected = probs.flatten() * counts.sum()
    counts = counts.flatten()
    common = expected >= 10
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def sampled(decoder: SpeculativeDecoder, draws: int) -> tuple[Tensor, float]:
    """Counts [first, second, third token], and the mean accepted length."""
    counts = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    passes = 0
    params = [SamplingParams(TEMPERATURE, TOP_P, max_new_tokens=3, seed=seed) for seed in range(draws)]
    for found in decoder.generate_batch([PROMPT] * draws, params, slots=128):
        counts[tuple(found.token_ids)] += 1
        passes += len(found.accepted_lengths)
    return counts, 2 * draws / passes


def bonus_without_top_p(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    """The rule, but the bonus token may be one that was rejected."""
    found = verify_deterministic(tree, target_probs, generator)
    row = found.nodes[-1] + 1 if found.nodes else 0
    return Verified(found.nodes, found.tokens, draw(target_probs[row], generator))


def first_child_wins(tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Verified:
    """Accepts the first child with probability 1 in 2 whatever the target says."""
    below = children(tree.parents.tolist()).get(-1, [])
    if below and float(torch.rand((), generator=generator)) < 0.5:
        child = below[0]
        return Verified([child], [int(tree.tokens[child])], draw(target_probs[child + 1], generator))
    return verify_deterministic(tree, target_probs, generator)


def test_sampling_is_the_targets_distribution(small: Target) -> None:
    head = random_head(small, seed=2, spread=0.3, layers=(0, 1))
    truth = analytic(small)
    assert float(truth.sum()) == pytest.approx(1, abs=1e-6)
    decoder = SpeculativeDecoder(small, head, DynamicTree(depth=2, top_k=3, total_tokens=6))
    counts, accepted = sampled(decoder, DRAWS)
    assert accepted > 1.2  # the tree is at work
    assert not bool((counts[truth == 0] > 0).any())  # top-p holds for drafted and bonus tokens alike
    assert p_value(counts, truth) > 1e-3
    assert p_value(counts.sum(2), truth.sum(2)) > 1e-3


@pytest.mark.parametrize("mutant", [bonus_without_top_p, first_child_wins])
def test_a_wrong_rule_would_be_noticed(
    mutant: Callable[..., Verified], small: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "verify_deterministic", mutant)
    head = random_head(small, seed=2, spread=0.3, layers=(0, 1))
    counts, _ = sampled(SpeculativeDecoder(small, head, DynamicTree(depth=2, top_k=3, total_tokens=6)), 1000)
    assert p_value(counts.sum(2), analytic(small).sum(2)) < 1e-6


def test_seeds(tiny_target: Target) -> None:
    decoder = SpeculativeDecoder(tiny_target, random_head(tiny_target), TREE)

    def say(seed: int, temperature: float = 1.0) -> Generation:
        return decoder.generate([5, 6], 12, temperature=temperature, seed=seed)

    assert say(1).token_ids == say(1).token_ids
    assert say(1).accepted_lengths == say(1).accepted_lengths
    assert len({tuple(say(seed).token_ids) for seed in range(6)}) > 3
    assert say(1, 1e-6).token_ids == say(2, 0.0).token_ids
    for other in (SpeculativeDecoder(tiny_target), SpeculativeDecoder(tiny_target, random_head(tiny_target), Chain())):
        for seed in range(3):
            assert other.generate([5, 6], 12, temperature=1.0, seed=seed).token_ids == say(seed).token_ids
