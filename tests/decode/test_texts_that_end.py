"""Where a text ends: end tokens, the limit and stop strings inside accepted paths, alone and in a batch; and requests
and numbers that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafts import distribution, mostly_right
from test_engine import make_prompts, random_head
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sstf.decode import SpeculativeDecoder, Step
from sstf.decode.stop import StopStrings
from sstf.errors import DecodeError
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, CostAwareTree, DynamicTree, StaticTree
from sstf.types import SamplingParams

NEW = 40
PROMPTS = make_prompts(8)
TREE = DynamicTree(depth=4, top_k=4, total_tokens=10)


@pytest.fixture(scope="module")
def plain_answers(tiny_target: Target) -> list[list[int]]:
    """`NEW` tokens each, end tokens or not; decoded plainly, which other tests compare with transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "end_tokens", frozenset())
        decoder = SpeculativeDecoder(tiny_target)
        return [decoder.generate(prompt, NEW).token_ids for prompt in PROMPTS]


@pytest.fixture
def answers(plain_answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """`plain_answers`, where nothing ends a text earlier."""
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    return plain_answers


def knowing(answers: list[list[int]]) -> Any:
    return distribution(mostly_right(list(zip(PROMPTS, answers, strict=True)), 300), 300)


class Stream:
    """Collects what `on_step` shows of every prompt."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def __call__(self, index: int, step: Step) -> None:
        assert 0 <= step.accepted <= len(step.tokens)
        self.tokens.setdefault(index, []).extend(step.tokens)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("policy", [Chain(depth=4), TREE], ids=["chain", "tree"])
def test_end_tokens_and_limits_inside_paths(
    slots: int, policy: AnyTree, tiny_target: Target, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = frozenset(answer[7 + 3 * i] for i, answer in enumerate(answers[:4]))
    monkeypatch.setattr(Target, "end_tokens", ends)
    limits = [NEW, NEW - 1, 5, NEW, 17, 1, 2, 23]
    decoder, stream = SpeculativeDecoder(tiny_target, knowing(answers), policy), Stream()
    params = [SamplingParams(max_new_tokens=limit) for limit in limits]
    kinds = set()
    for i, found in enumerate(decoder.generate_batch(PROMPTS, params, slots, stream)):
        cut = answers[i][: limits[i]]
        end = next((place + 1 for place, token in enumerate(cut) if token in ends), None)
        assert found.token_ids == cut[:end] == stream.tokens[i]
        assert found.ended == ("end" if end else "length")
        assert sum(found.accepted_lengths) == len(found.token_ids) - 1
        kinds.add(found.ended)
    assert kinds == {"end", "length"}


# ---- stop strings ----------------------------------------------------------------------------------------------------


def naive(tokenizer: PreTrainedTokenizerBase, tokens: list[int], strings: tuple[str, ...]) -> int | None:
    """Tokens up to the one with which the decoded text first holds one of the strings."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if any(string in text for string in strings):
            return count
    return None


# Byte-level tokens: one a byte, but for the words that the tokenizer of the tests knows (`Hello`, `Hi`, `user`).
@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ("ab##cd", ("##",)),
        ("aHellob Hello", ("lob",)),  # begins inside a token
        ("so xHello", ("xHe",)),  # ends inside one
        ("xyz", ("xyz",)),  # three tokens
        ("a中文b", ("中",)),  # three bytes, three tokens
        ("1😀2", ("😀2",)),
        ("one two", ("two", "ne")),  # the first to be complete, not the first named
        ("Hello", ("Hello",)),  # the very first token
        ("nothing", ("xx",)),
        ("aa" * 40 + "end", ("a" * 60 + "end",)),  # longer than a window of a few tokens
        ("<|im_end|>x", ("x",)),
    ],
)
def test_stop_strings(text: str, strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    expected = naive(tokenizer, tokens, strings)
    assert (expected is None) == (text == "nothing")
    for pieces in (1, 2, 3, len(tokens)):  # however many tokens a pass emits
        stop, emitted, found = StopStrings(tokenizer, strings), list[int](), None
        for start in range(0, len(tokens), pieces):
            new = tokens[start : start + pieces]
            count = stop.cut(emitted, new)
            emitted += new[:count]
            if count is not None:
                found = len(emitted)
                break
        assert found == expected


def stop_strings(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> dict[str, tuple[str, ...]]:
    """Found in the text itself, so that they surely come up; only such whose text does not depend on the rest."""
    text = {n: str(tokenizer.decode(answer[:n])) for n in range(len(answer) + 1)}
    three = text[13][len(text[10]) :]
    return {
        "first": (text[1],),
        "three-tokens": (three,),
        "two": (text[22][len(text[20]) :], three),
        "none": ("\x00\x01",),
    }


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("policy", [Chain(depth=4), TREE], ids=["chain", "tree"])
def test_stop_strings_inside_paths(slots: int, policy: AnyTree, tiny_target: Target, answers: list[list[int]]) -> None:
    decoder = SpeculativeDecoder(tiny_target, knowing(answers), policy)
    seen = set()
    for kind in ("first", "three-tokens", "two", "none"):
        strings = [stop_strings(tiny_target.tokenizer, answer)[kind] for answer in answers]
        assert all(string for each in strings for string in each)
        params = [SamplingParams(max_new_tokens=NEW, stop=each) for each in strings]
        stream = Stream()
        for i, found in enumerate(decoder.generate_batch(PROMPTS, params, slots, stream)):
            count = naive(tiny_target.tokenizer, answers[i], strings[i])
            assert found.token_ids == answers[i][:count] == stream.tokens[i]
            assert found.ended == ("stop" if count else "length")
            assert sum(found.accepted_lengths) == len(found.token_ids) - 1
            seen.add((kind, found.ended))
    assert {("first", "stop"), ("three-tokens", "stop"), ("two", "stop"), ("none", "length")} <= seen


def test_a_stop_string_may_come_alone(tiny_target: Target, answers: list[list[int]]) -> None:
    """Not as the letters it consists of."""
    string = stop_strings(tiny_target.tokenizer, answers[0])["three-tokens"][0]
    decoder = SpeculativeDecoder(tiny_target)
    assert len(string) > 1
    found = decoder.generate(PROMPTS[0], NEW, stop=string)
    assert found.token_ids == decoder.generate(PROMPTS[0], NEW, stop=[string]).token_ids
    assert found.token_ids == answers[0][: naive(tiny_target.tokenizer, answers[0], (string,))]


def test_an_end_token_that_completes_a_stop_string_is_an_end(
    tiny_target: Target, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answers[0][0]
    monkeypatch.setattr(Target, "end_tokens", frozenset({first}))
    found = SpeculativeDecoder(tiny_target).generate(PROMPTS[0], NEW, stop=[str(tiny_target.tokenizer.decode([first]))])
    assert (found.token_ids, found.ended) == ([first], "end")


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[3], []]}, r"input_ids has shape \[0\]"),
        (
            {"prompts": [[3], [3] * 250]},
            "the prompt has 250 tokens and max_new_tokens is 8, together more than the tar",
        ),
        ({"slots": 0}, "slots is 0 and there are 2 params for 2 prompts; expected at least one slot"),
        ({"params": [SamplingParams()]}, "there are 1 params for 2 prompts"),
        ({"params": SamplingParams(max_new_tokens=0)}, "max_new_tokens is 0"),
        ({"params": SamplingParams(top_k=-1, max_new_tokens=8)}, r"top_k is -1; expected 0 \(off\) or above"),
        ({"params": SamplingParams(stop=("a", ""), max_new_tokens=8)}, "stop holds an empty string, which every text"),
        ({"params": SamplingParams(temperature=float("nan"), max_new_tokens=8)}, "temperature is nan"),
        ({"params": SamplingParams(top_p=-0.5, max_new_tokens=8)}, "top_p is -0.5"),
    ],
)
def test_batches_out_of_range(arguments: dict[str, Any], message: str, tiny_target: Target) -> None:
    fine: dict[str, Any] = {"prompts": [[3], [4, 5]], "params": SamplingParams(max_new_tokens=8), "slots": 2}
    with pytest.raises(DecodeError, match=message):
        SpeculativeDecoder(tiny_target).generate_batch(**(fine | arguments))


def test_no_prompts(tiny_target: Target) -> None:
    assert SpeculativeDecoder(tiny_target).generate_batch([]) == []


class Broken:
    """Makes the target's last states NaN in one row of one pass."""

    def __init__(self, target: Target, call: int, batch: int, row: int) -> None:
        self.call, self.where = call, (batch, row)
        self.handle = target.decoder.norm.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.call -= 1
        if self.call == -1:
            output[self.where] = float("nan")
        return output


def test_logits_that_are_not_finite_in_a_batch_and_in_a_tree(tiny_target: Target, answers: list[list[int]]) -> None:
    """Three prompts are three calls, then the first pass: rows are the root and its nodes."""
    prompts = PROMPTS[1:4]
    for policy, row, depth in ((Chain(depth=3), 0, 0), (Chain(depth=3), 2, 2), (StaticTree.full(2, 1), 2, 1),
                               (StaticTree.full(2, 1), 4, 2)):  # fmt: skip
        decoder = SpeculativeDecoder(tiny_target, knowing(answers), policy)
        broken = Broken(tiny_target, 3, batch=1, row=row)
        try:
            with pytest.raises(DecodeError, match=rf"NaN or infinite logits at position {len(prompts[1]) + depth};"):
                decoder.generate_batch(prompts, SamplingParams(max_new_tokens=NEW), 3)
        finally:
            broken.handle.remove()
        again = decoder.generate_batch(PROMPTS, SamplingParams(max_new_tokens=NEW), 3)
        assert [found.token_ids for found in again] == answers


def test_padding_that_is_not_finite_is_nobodys(tiny_target: Target, answers: list[list[int]]) -> None:
    """A sequence without a draft beside one with three nodes: its rows behind the root are padding."""
    prompts = PROMPTS[1:3]
    decoder = SpeculativeDecoder(tiny_target, knowing(answers), Chain(depth=3))
    broken = Broken(tiny_target, 2, batch=0, row=2)
    try:
        params = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=NEW)]  # 2: no room for a draft
        found = decoder.generate_batch(prompts, params, 2)
    finally:
        broken.handle.remove()
    assert broken.call < 0
    assert [one.token_ids for one in found] == [answers[1][:2], answers[2]]


def test_a_cache_that_held_nan_spoils_nothing_later(tiny_target: Target, answers: list[list[int]]) -> None:
    """Keys of a long text that went wrong would lie behind those of a shorter one: masked, but 0 times NaN is NaN."""
    decoder = SpeculativeDecoder(tiny_target)
    handle = tiny_target.layers[0].register_forward_hook(
        lambda module, args, output: (output[0] if isinstance(output, tuple) else output).fill_(float("nan"))
    )
    params = SamplingParams(max_new_tokens=NEW)
    try:
        with pytest.raises(DecodeError, match="NaN or infinite logits"):
            decoder.generate_batch([[5] * 60, [6] * 60], params, 3)
    finally:
        handle.remove()
    found = decoder.generate_batch([PROMPTS[1], PROMPTS[4]], params, 2)  # the shorter one where the wrong one was
    assert [one.token_ids for one in found] == [answers[1], answers[4]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "policy",
    [Chain(depth=2), Chain(depth=2, draw="iid"), StaticTree.full(2, 2), StaticTree.full(2, 2, draw="iid"),
     StaticTree.full(2, 2, draw="without_replacement"), TREE, TREE.model_copy(update={"calibrated": True}),
     TREE.model_copy(update={"lookup": True}), CostAwareTree()],
    ids=["chain", "chain-iid", "static", "static-iid", "static-without", "dynamic", "calibrated", "lookup", "cost"],
)  # fmt: skip
@pytest.mark.parametrize("slots", [1, 2])
def test_a_head_that_returns_nan(slots: int, policy: AnyTree, temperature: float, tiny_target: Target) -> None:
    head = random_head(tiny_target)
    assert head.module is not None
    with torch.no_grad():
        next(head.module.midlayer.parameters())[:1] = float("nan")  # type: ignore[union-attr, operator]
    decoder = SpeculativeDecoder(tiny_target, head, policy)
    with pytest.raises(DecodeError, match="draft head random returned draft probabilities that are NaN; check its wei"):
        decoder.generate_batch(PROMPTS[:3], SamplingParams(temperature, max_new_tokens=8), slots)


def test_drafts_are_never_deeper_than_what_may_be_emitted(tiny_target: Target, answers: list[list[int]]) -> None:
    head = knowing(answers)
    for policy in (Chain(depth=30), DynamicTree(depth=30, top_k=2, total_tokens=40)):
        for limit in (2, 3, 9):
            method = head.method
            method.rooms.clear()
            SpeculativeDecoder(tiny_target, head, policy).generate(PROMPTS[1], limit)
            assert all(0 < room < limit for room in method.rooms) and (limit > 2) == bool(method.rooms)


def test_a_right_chain_in_a_batch_is_accepted_depth_of_depth(tiny_target: Target, answers: list[list[int]]) -> None:
    def next_logits(text: tuple[int, ...]) -> Tensor:
        row = torch.zeros(300)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            whole = (*prompt[1:], *answer)
            if whole[: len(text)] == text and len(whole) > len(text):
                row[whole[len(text)]] = 9.0
        return row

    decoder = SpeculativeDecoder(tiny_target, distribution(next_logits, 300), Chain(depth=4))
    for found, answer in zip(
        decoder.generate_batch(PROMPTS[1:], SamplingParams(max_new_tokens=NEW), 3), answers[1:], strict=True
    ):
        assert found.token_ids == answer
        assert found.accepted_lengths == [5] * 7 + [4]  # 39 behind the first
