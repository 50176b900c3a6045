"""Sequences that come and go between steps: each says what it says alone."""

from __future__ import annotations

import threading

import pytest
import torch
from test_engine import make_prompts, random_head

from sstf.decode import SpeculativeDecoder, Step
from sstf.errors import DecodeError
from sstf.targets import Target
from sstf.trees import Chain, CostAwareTree, DynamicTree
from sstf.types import SamplingParams

PROMPTS = make_prompts(6)
NEW = 24
LOOKUP = CostAwareTree(depth=3, top_k=3, total_tokens=8, lookup=True)


def params(i: int) -> SamplingParams:
    """Greedy and sampled ones, side by side."""
    return SamplingParams((0.0, 0.7, 1.2)[i % 3], top_p=(1.0, 0.9)[i % 2], max_new_tokens=NEW, seed=i)


@pytest.fixture
def alone(tiny_target: Target) -> list[list[int]]:
    decoder = SpeculativeDecoder(tiny_target)
    return [decoder.generate_batch([prompt], params(i), 1)[0].token_ids for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("policy", [Chain(depth=3), DynamicTree(depth=3, top_k=3, total_tokens=8), LOOKUP])
def test_sequences_come_and_go(
    policy: Chain | DynamicTree | CostAwareTree, tiny_target: Target, alone: list[list[int]]
) -> None:
    """One more every other step into three slots; the fourth is dropped half-way, and its slot is used again."""
    decoder = SpeculativeDecoder(tiny_target, random_head(tiny_target), policy)
    heard: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    drafted = 0

    def hear(i: int, step: Step) -> None:
        nonlocal drafted
        heard[i] += step.tokens
        drafted += step.drafted
        assert step.accepted <= step.drafted

    with decoder.session(3, 64) as session:
        started, steps, most = [], 0, 0
        while len(started) < len(PROMPTS) or session.active:
            if steps % 2 == 0 and len(started) < len(PROMPTS) and session.free:
                i = len(started)
                started.append(session.add(PROMPTS[i], params(i), lambda step, i=i: hear(i, step)))
            if len(started) > 3 and len(heard[3]) >= 5:
                session.drop(started[3])
            session.step()
            most = max(most, len(session.active))
            steps += 1
        assert session.free == 3
    assert most == 3 and drafted > 20
    for i, (sequence, expected) in enumerate(zip(started, alone, strict=True)):
        if i == 3:
            assert sequence.generation is None
            assert heard[3] == expected[: len(heard[3])] and 5 <= len(heard[3]) < len(expected)
        else:
            assert sequence.generation is not None
            assert sequence.generation.token_ids == heard[i] == expected


def test_costs_are_kept_by_the_number_that_shares_a_pass(tiny_target: Target) -> None:
    decoder = SpeculativeDecoder(tiny_target, random_head(tiny_target), LOOKUP)
    with decoder.session(6, 64) as session:
        costs = decoder.experience.costs
        assert list(costs) == [1, 2, 4, 6]
        for count, size in enumerate((1, 2, 4, 4, 6, 6), start=1):
            session.add([5, 6, 7], SamplingParams(max_new_tokens=8, seed=count))
            if len(session.active) == count:  # it has not ended with its first token
                assert session.cost is costs[size]


def test_what_does_not_fit_is_refused(tiny_target: Target) -> None:
    decoder = SpeculativeDecoder(tiny_target)
    with decoder.session(1, 20) as session:
        with pytest.raises(DecodeError, match="expected one for 15 tokens and 6 new ones"):
            session.add([5] * 15, SamplingParams(max_new_tokens=6))
        with pytest.raises(DecodeError, match="temperature is -1"):
            session.add([5], SamplingParams(-1.0, max_new_tokens=4))
        session.step()  # nobody: nothing happens
        session.add(PROMPTS[0][:8], SamplingParams(max_new_tokens=12))
        with pytest.raises(DecodeError, match="0 of 1 slots are free"):
            session.add([5], SamplingParams(max_new_tokens=2))


def test_a_decoder_is_used_in_another_thread(tiny_target: Target, alone: list[list[int]]) -> None:
    """Than the one that made it: its taps see the passes of the thread that opens a session."""
    decoder = SpeculativeDecoder(tiny_target, random_head(tiny_target), Chain(depth=3))
    found: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: found.append(decoder.generate(PROMPTS[0], NEW, params(0).temperature).token_ids)
    )
    thread.start()
    thread.join(60)
    assert found == [alone[0]]
    assert not torch.is_inference_mode_enabled()
