"""Targets whose layers do not all attend to everything, beyond their windows: the text stays transformers' own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
import torch
import transformers
from test_engine import chain, hidden_oracle, scripted
from transformers import PreTrainedTokenizerBase

from sstf.decode import SpeculativeDecoder
from sstf.methods import NgramConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, DynamicTree
from sstf.types import SamplingParams

NEW = 40
SMALL: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    bos_token_id=1,
)  # fmt: skip
FOUR = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-sliding": ("Mistral", dict(num_hidden_layers=2, sliding_window=8)),
    "mixed": ("Gemma2", dict(num_hidden_layers=4, sliding_window=8, layer_types=FOUR)),
    "mixed-with-two-ropes": ("Gemma3", dict(num_hidden_layers=4, sliding_window=8, layer_types=FOUR)),
    "mixed-qwen": (
        "Qwen2",
        dict(num_hidden_layers=4, sliding_window=8, use_sliding_window=True, max_window_layers=2),
    ),
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("Lfm2", dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])),
    "linear-attention": (
        "Qwen3Next",
        dict(
            num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            decoder_sparse_step=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, mlp_only_layers=[0, 1, 2],
        ),
    ),
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [9, 4, 7, 5, 6, 11, 12, 5, 17, 230, 4, 7, 8, 5, 6], [77]]


def build(
    name: str, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> Target:
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**(SMALL | fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return Target(name, model, tokenizer)


def generated(target: Target, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def half_right(answer: list[int], prompt: list[int]) -> Callable[[list[int], Any], Any]:
    """Chains whose first 0, 1, 2, 3, 0, .. tokens are right."""
    whole = [*prompt[1:], *answer]
    calls = count()

    def make(history: list[int], policy: Any) -> Any:
        tokens = whole[len(history) : len(history) + policy.depth]
        right = next(calls) % 4
        return chain([token if i < right else (token + 1) % 300 for i, token in enumerate(tokens)])

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    target = build(*KINDS[kind], tokenizer, monkeypatch)
    assert target.takes_trees and target.context == 128
    answers = [generated(target, prompt) for prompt in PROMPTS]
    assert len({tuple(answer[-5:]) for answer in answers}) > 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert SpeculativeDecoder(target).generate(prompt, NEW).token_ids == answer
        # Wrong nodes stand in the cache before right ones, so a window by place instead of position would show.
        head = scripted(hidden_oracle(answer, prompt))
        found = SpeculativeDecoder(target, head, DynamicTree(depth=3, total_tokens=9)).generate(prompt, NEW)
        assert found.token_ids == answer
        assert found.accepted_length > 3.5
    ngram = DraftHead("ngram", build_method(NgramConfig(min_n=1)))
    for head in (None, ngram):
        batch = SpeculativeDecoder(target, head).generate_batch(PROMPTS, SamplingParams(max_new_tokens=NEW), slots=3)
        assert [found.token_ids for found in batch] == answers


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_states(kind: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree is impossible, which is said; chains work, and a rejected token leaves no trace in the state."""
    target = build(*RECURRENT[kind], tokenizer, monkeypatch)
    assert target.recurrent and not target.takes_trees
    for prompt in PROMPTS:
        answer = generated(target, prompt)
        assert SpeculativeDecoder(target).generate(prompt, NEW).token_ids == answer
        with pytest.warns(UserWarning, match="keeps a recurrent state: it is drafted for in chains, not trees"):
            decoder = SpeculativeDecoder(target, scripted(half_right(answer, prompt)), DynamicTree(depth=3))
        assert decoder.policy == Chain(depth=3)
        found = decoder.generate(prompt, NEW)
        assert found.token_ids == answer
        assert found.accepted_lengths[:6] == [1, 2, 3, 4, 1, 2]
    with pytest.warns(UserWarning, match="one sequence at a time: slots is 1"):
        batch = SpeculativeDecoder(target).generate_batch(PROMPTS, SamplingParams(max_new_tokens=NEW), slots=2)
    assert [found.token_ids for found in batch] == [generated(target, prompt) for prompt in PROMPTS]
