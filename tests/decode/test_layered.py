"""Decoding in layers: the first draft, the others verify; nothing runs twice, and the text is the target's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from drafts import prompts_of_equal_lengths, transformers_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_drawn_text import p_value
from test_engine import make_prompts
from test_passes import branch, last_logits
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from sstf.decode import AnyPolicy, BanditPolicy, Experience, SpeculativeDecoder, Step
from sstf.decode.cost import KNOTS, CostModel
from sstf.decode.engine import SequenceState
from sstf.decode.layered import LayeredPasses
from sstf.decode.measure import measure_costs
from sstf.errors import DecodeError
from sstf.methods import EarlyExitConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import PreallocatedCache, SplitDecoder, Target
from sstf.trees import Chain, CostAwareTree, DynamicTree, StaticTree, growth
from sstf.types import DraftTree, SamplingParams
from sstf.warping import warp

Pairs = list[tuple[list[int], list[int]]]
EXIT = 5
NEW = 24
CHAIN, DYNAMIC = Chain(depth=4), DynamicTree(depth=4, top_k=4, total_tokens=12)
STATIC = StaticTree(paths=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0, 0)))
COST_AWARE = CostAwareTree(depth=5, top_k=3, total_tokens=16)
POLICIES: dict[str, AnyPolicy] = {
    "chain": CHAIN,
    "static": STATIC,
    "dynamic": DYNAMIC,
    "cost-aware": COST_AWARE,
    "lookup": DYNAMIC.model_copy(update={"lookup": True}),
    "bandit": BanditPolicy(
        arms={"chain": CHAIN, "static": STATIC, "dynamic": DYNAMIC}, half_life=15, dwell=2, margin=0.0
    ),
}


def random_adapter(
    target: Target, exit_layer: int = EXIT, threshold: float = 0.0, seed: int = 0, spread: float = 0.02
) -> DraftHead:
    method = build_method(EarlyExitConfig(exit_layer=exit_layer, threshold=threshold))
    torch.manual_seed(seed)
    size = target.spec.vocab_size
    head = method.build_head(target.spec, target.frozen_head, torch.arange(1, size))  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return DraftHead("random", method, head.eval())


@pytest.fixture(scope="module")
def pairs(tiny_target: Target) -> list[tuple[list[int], list[int]]]:
    prompts = prompts_of_equal_lengths((1, 9, 30), each=4, seed=21)
    return list(zip(prompts, transformers_answers(tiny_target, prompts, NEW), strict=True))


def decoder_of(target: Target, name: str, head: DraftHead | None = None) -> SpeculativeDecoder:
    experience = Experience()
    for size in (1, 2, 3, 4):
        experience.costs[size] = CostModel([1e-3 + 2e-5 * knot for knot in KNOTS], draft_s=5e-5, host_s=1e-4)
    return SpeculativeDecoder(target, head or random_adapter(target), POLICIES[name], experience=experience)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_text_is_the_targets(name: str, tiny_target: Target, pairs: Pairs) -> None:
    """Alone, and three at once with other lengths and limits, in slots that are used again."""
    decoder = decoder_of(tiny_target, name)
    lengths: list[int] = []
    for prompt, answer in pairs[1::4]:
        found = decoder.generate(prompt, NEW)
        assert found.token_ids == answer
        lengths += found.accepted_lengths
    limits = [(NEW, 1, 17, 2, 20, 3)[i % 6] for i in range(len(pairs))]
    params = [SamplingParams(max_new_tokens=limit) for limit in limits]
    batch = decoder.generate_batch([prompt for prompt, _ in pairs], params, slots=3)
    for (_, answer), limit, one in zip(pairs, limits, batch, strict=True):
        assert one.token_ids == answer[:limit]
        lengths += one.accepted_lengths
    assert sum(lengths) > 1.03 * len(lengths)  # something was accepted


@pytest.mark.parametrize("threshold", [0.02, 1.0])
def test_where_the_draft_is_in_doubt_the_text_is_the_same(threshold: float, tiny_target: Target, pairs: Pairs) -> None:
    """At 1 nothing is ever drafted, and the deep layers still go on from the root's shallow state."""
    drafted = {}
    for name in ("chain", "dynamic"):
        decoder = decoder_of(tiny_target, name, random_adapter(tiny_target, threshold=threshold))
        found: list[Step] = []
        batch = decoder.generate_batch(
            [p for p, _ in pairs[:7]], SamplingParams(max_new_tokens=NEW), 3, lambda _, step, to=found: to.append(step)
        )
        assert [one.token_ids for one in batch] == [answer for _, answer in pairs[:7]]
        drafted[name] = sum(step.drafted for step in found)
    assert (max(drafted.values()) == 0) == (threshold == 1.0)


SMALL: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
    num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
    eos_token_id=None, pad_token_id=0, bos_token_id=1, sliding_window=8,
)  # fmt: skip


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_beyond_the_windows_of_a_target(
    name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers hide keys by their position, drafted rows are seen by theirs."""
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    torch.manual_seed(0)
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "Gemma2" else {}
    config = getattr(transformers, f"{name}Config")(**SMALL, **mixed)
    target = Target(name, getattr(transformers, f"{name}ForCausalLM")(config), tokenizer)
    prompts = prompts_of_equal_lengths((1, 15, 30), each=2)
    answers = transformers_answers(target, prompts, NEW)
    for policy in ("static", "dynamic", "lookup"):
        decoder = decoder_of(target, policy, random_adapter(target, 2))
        batch = decoder.generate_batch(prompts, SamplingParams(max_new_tokens=NEW), slots=3)
        assert [one.token_ids for one in batch] == answers
        assert decoder.generate(prompts[2], NEW).token_ids == answers[2]


# ---- whatever was drafted, and whatever the tree is ------------------------------------------------------------------

TOKENS = st.sampled_from([5, 6, 7])  # few, so that nodes are often among the drafted rows, and often twice


@st.composite
def drafted_steps(draw: st.DrawFn, slots: int) -> list[dict[str, Any]]:
    """Two steps: who takes part and who drafts; two drafted levels; trees that need not fit to them."""
    steps = []
    for _ in range(2):
        active = sorted(draw(st.sets(st.integers(0, slots - 1), min_size=1)))
        drafting = [slot for slot in active if draw(st.booleans())]
        levels, width = [], 1
        for _ in range(draw(st.integers(0, 2))):
            count = draw(st.integers(1, 3))
            rows = [
                [(draw(st.integers(0, width - 1)), draw(TOKENS)) for _ in range(count)] for _ in range(len(drafting))
            ]
            levels.append(rows)
            width = count
        trees = {}
        for slot in active:
            size = draw(st.integers(0, 5))
            parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
            trees[slot] = ([draw(TOKENS) for _ in range(size)], parents, draw(st.integers(-1, size - 1)))
        steps.append({"drafting": drafting, "levels": levels, "trees": trees})
    return steps


@pytest.mark.parametrize("slots", [1, 3])
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_every_node_sees_its_path_and_what_is_kept_is_as_if_computed_anew(
    slots: int, data: st.DataObject, tiny_target: Target
) -> None:
    texts = [[9, 8, 5, 6][: 1 + slot] for slot in range(slots)]
    plan = data.draw(drafted_steps(slots), "steps")
    plan.append({"drafting": [], "levels": [], "trees": {slot: ([], [], -1) for slot in range(slots)}})
    split = SplitDecoder(tiny_target, EXIT)
    with torch.inference_mode(), tiny_target.tap((EXIT - 1,)) as taps:
        passes = LayeredPasses(tiny_target, split, taps, slots, 96)
        for slot, text in enumerate(texts):
            passes.prefill(slot, text)
        for number, step in enumerate(plan):
            root, active = 100 + number, list(step["trees"])
            past = [len(texts[slot]) for slot in active]
            if drafting := step["drafting"]:
                rows = passes.root(drafting, [len(texts[slot]) for slot in drafting], [root] * len(drafting))
                paths = [[[*texts[slot], root]] for slot in drafting]
                for level in step["levels"]:
                    parents, tokens = torch.tensor(level).unbind(-1)
                    rows = passes.descend(parents, tokens)
                    paths = [[[*own[p], t] for p, t in new] for own, new in zip(paths, level, strict=True)]
                for own, states in zip(paths, rows.states, strict=True):
                    for path, state in zip(own, states, strict=True):
                        tiny_target.model(torch.tensor([path]), use_cache=False)
                        torch.testing.assert_close(state, taps.features()[0, -1], atol=2e-5, rtol=1e-4)
            trees = [
                DraftTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64))
                for tokens, parents, _ in step["trees"].values()
            ]
            logits, features = passes.verify(active, past, [root] * len(active), trees)
            logits, features = logits.clone(), features.clone()
            kept = []
            for i, (slot, (tokens, parents, accepted)) in enumerate(step["trees"].items()):
                for node in range(-1, len(tokens)):
                    path = [*texts[slot], root, *(tokens[above] for above in branch(parents, node))]
                    torch.testing.assert_close(
                        logits[i, node + 1], last_logits(tiny_target, path), atol=2e-5, rtol=1e-4
                    )
                    torch.testing.assert_close(features[i, node + 1], taps.features()[0, -1], atol=2e-5, rtol=1e-4)
                kept.append([0, *(node + 1 for node in branch(parents, accepted))])
            passes.keep(active, past, kept)
            for (slot, (tokens, _, _)), places in zip(step["trees"].items(), kept, strict=True):
                texts[slot] += [root, *(tokens[place - 1] for place in places[1:])]


# ---- no work twice ---------------------------------------------------------------------------------------------------


@contextmanager
def watched(target: Target) -> Iterator[list[list[Tensor]]]:
    """Outputs [row, hidden] of every pass through each layer."""
    seen: list[list[Tensor]] = [[] for _ in target.layers]
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, to=to: to.append(output.flatten(0, 1)))
        for layer, to in zip(target.layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["chain", "static", "dynamic", "lookup"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_no_token_runs_through_a_layer_twice(name: str, threshold: float, tiny_target: Target, pairs: Pairs) -> None:
    """The same token behind the same text would leave the same state twice: prompt, drafts and accepted ones alike.
    The deep layers run on the prompt, the roots and the verified nodes, and nothing else."""
    prompt, answer = pairs[-1]
    decoder = decoder_of(tiny_target, name, random_adapter(tiny_target, threshold=threshold))
    steps: list[Step] = []
    with watched(tiny_target) as seen:
        assert decoder.generate(prompt, NEW, on_step=steps.append).token_ids == answer
    shallow, deep = torch.cat(seen[EXIT - 1]), torch.cat(seen[EXIT])
    distances = torch.cdist(shallow, shallow).fill_diagonal_(float("inf"))
    assert float(distances.min()) > 1e-3 * float(shallow.norm(dim=-1).mean())  # one that ran twice would be at 1e-6
    verified = sum(1 + step.drafted for step in steps[1:])  # the first is the prompt's
    assert len(deep) == len(prompt) + verified
    counts = [sum(map(len, layer)) for layer in seen]
    assert counts == [len(shallow)] * EXIT + [len(deep)] * (8 - EXIT)
    if name == "chain":
        assert len(shallow) == len(deep)  # all that was drafted is verified
    else:
        assert len(shallow) >= len(deep)


def test_nobody_drafts_in_whole_passes(tiny_target: Target, pairs: Pairs) -> None:
    """Two new tokens: behind the first there is room for a bonus token alone, and one pass of all layers."""
    decoder = decoder_of(tiny_target, "chain")
    with watched(tiny_target) as seen:
        decoder.generate(pairs[-1][0], 2)
    assert [len(layer) for layer in seen] == [2] * 8


# ---- sequences that come and go --------------------------------------------------------------------------------------


def params(i: int) -> SamplingParams:
    """Greedy and sampled ones, side by side."""
    return SamplingParams((0.0, 0.7, 1.2)[i % 3], top_p=(1.0, 0.9)[i % 2], max_new_tokens=24, seed=i)


@pytest.mark.parametrize("name", ["chain", "dynamic", "lookup", "bandit"])
def test_sequences_come_and_go(name: str, tiny_target: Target) -> None:
    """One more every other step into three slots; the fourth is dropped half-way, and its slot is used again."""
    prompts = make_prompts(7)
    plain = SpeculativeDecoder(tiny_target)
    alone = [plain.generate_batch([prompt], params(i), 1)[0].token_ids for i, prompt in enumerate(prompts)]
    heard: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    decoder = decoder_of(tiny_target, name)
    with decoder.session(3, 64) as session:
        started: list[SequenceState] = []
        steps = 0
        while len(started) < len(prompts) or session.active:
            if steps % 2 == 0 and len(started) < len(prompts) and session.free:
                i = len(started)
                started.append(session.add(prompts[i], params(i), lambda step, i=i: heard[i].extend(step.tokens)))
            if len(started) > 3 and len(heard[3]) >= 5:
                session.drop(started[3])
            session.step()
            steps += 1
    for i, (sequence, expected) in enumerate(zip(started, alone, strict=True)):
        if i == 3:
            assert sequence.generation is None and heard[3] == expected[: len(heard[3])]
        else:
            assert sequence.generation is not None
            assert sequence.generation.token_ids == heard[i] == expected


def test_costs_of_passes_in_layers(tiny_target: Target) -> None:
    decoder = decoder_of(tiny_target, "chain")
    cost = measure_costs(tiny_target, decoder.drafter, decoder.layers, 2, repeats=1, past=8, split=decoder.split)
    assert min(cost.verify_s) > 0 and cost.draft_s > 0
    with watched(tiny_target) as seen:
        measure_costs(tiny_target, None, decoder.layers, repeats=1, past=8, split=decoder.split)
    # The prompt; then twice a whole pass of one row, and for each size a root, the drafted nodes, and one that is left.
    assert [len(rows) for rows in seen[-1]] == [8, *KNOTS, *KNOTS]
    sizes = [[1], [1, 1], *([1, size - 2, 1] for size in KNOTS[2:])]
    assert [len(rows) for rows in seen[0]] == [8, *(rows for size in sizes * 2 for rows in size)]


def test_a_drafter_without_passes_is_refused(tiny_target: Target) -> None:
    head = random_adapter(tiny_target)
    with pytest.raises(DecodeError, match="was given no passes through them"):
        head.method.drafter(head.module, torch.device("cpu")).start(1, 64)


# ---- at temperature > 0 ----------------------------------------------------------------------------------------------

VOCAB = 5
START = [3, 1, 4]
WARP = (1.1, 0.95, 4)  # temperature, top-p, top-k
TEXT = 80


@pytest.fixture
def markov(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Two layers that see two tokens each: the next token depends on the last three."""
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    torch.manual_seed(7)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400, initializer_range=0.6, tie_word_embeddings=False,
        sliding_window=2, eos_token_id=None, pad_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return Target("markov", MistralForCausalLM(config), tokenizer)


def transitions(target: Target) -> Tensor:
    """[the last three tokens, next]."""
    last = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    found = []
    for front in ([1, 2], [4, 4, 0]):
        ids = torch.cat([torch.tensor([front]).expand(len(last), -1), last], 1)
        with torch.inference_mode():
            found.append(warp(target.model(ids, use_cache=False).logits[:, -1], *WARP).double())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    return found[0]


@dataclass
class Drawn:
    counts: Tensor  # [the last three tokens, next]
    accepted: float


def drawn(target: Target, policy: AnyPolicy, threshold: float, tokens: int = 3_000) -> Drawn:
    decoder = SpeculativeDecoder(target, random_adapter(target, 1, threshold, spread=0.1), policy)
    number = -(-tokens // TEXT)
    each = [SamplingParams(*WARP, TEXT, seed) for seed in range(number)]
    counts = torch.zeros(VOCAB**3, VOCAB, dtype=torch.float64)
    lengths: list[int] = []
    for found in decoder.generate_batch([START] * number, each, 75):
        text = torch.tensor([*START, *found.token_ids])
        before = text[:-3] * VOCAB**2 + text[1:-2] * VOCAB + text[2:-1]
        counts.index_put_((before, text[3:]), torch.ones(TEXT, dtype=torch.float64), accumulate=True)
        lengths += found.accepted_lengths
    return Drawn(counts, sum(lengths) / len(lengths))


def agrees(found: Drawn, truth: Tensor) -> bool:
    assert int(found.counts[truth == 0].sum()) == 0
    return p_value(found.counts[None], truth[None]) > 1e-3


TREE = StaticTree.full(3, 2)


@pytest.mark.parametrize(
    ("policy", "threshold"),
    [(Chain(depth=3), 0.5), (Chain(depth=3, draw="iid"), 0.5), (TREE, 0.0),
     (TREE.model_copy(update={"draw": "without_replacement"}), 0.5), (TREE.model_copy(update={"draw": "iid"}), 0.5),
     (DynamicTree(depth=3, top_k=3, total_tokens=8), 0.0)],
    ids=["chain", "chain-iid", "tree", "without-replacement", "tree-iid", "dynamic"],
)  # fmt: skip
def test_the_text_has_the_targets_distribution(policy: AnyPolicy, threshold: float, markov: Target) -> None:
    found = drawn(markov, policy, threshold)
    assert agrees(found, transitions(markov))
    assert found.accepted > 1.1


def by_own_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a token is verified depends on the token that was drawn."""
    right = growth._drawn

    def pruned(*args: Any) -> list[DraftTree]:
        trees = right(*args[:-1], 0.0)
        return [growth.prune(tree, (tree.confidence > 0.4).tolist()) for tree in trees]  # type: ignore[operator]

    monkeypatch.setattr(growth, "_drawn", pruned)


def shallow_states_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deep layers go on from another sequence's states."""
    right = LayeredPasses._complete
    monkeypatch.setattr(LayeredPasses, "_complete", lambda self, *args: right(self, *args).roll(1, 0))


def keys_left_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tree's nodes the shallow keys are not moved into its order."""
    right = PreallocatedCache.keep_rows

    def keep_rows(self: PreallocatedCache, *args: Any) -> None:
        if len(args) == 3:
            right(self, *args)

    monkeypatch.setattr(PreallocatedCache, "keep_rows", keep_rows)


@pytest.mark.parametrize(
    ("mutant", "policy", "threshold"),
    [
        (by_own_value, TREE.model_copy(update={"draw": "iid"}), 0.4),
        (shallow_states_of_neighbours, Chain(depth=3), 0.0),
        (keys_left_where_they_were, DynamicTree(depth=3, top_k=3, total_tokens=8), 0.0),
    ],
)
def test_a_wrong_pass_would_be_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], policy: AnyPolicy, threshold: float, markov: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    truth = transitions(markov)
    mutant(monkeypatch)
    found = drawn(markov, policy, threshold, 6_000)
    assert int(found.counts[truth == 0].sum()) > 50 or p_value(found.counts[None], truth[None]) < 1e-6
