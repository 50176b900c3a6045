"""A decoder in two parts says what the whole says, or is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from sstf.errors import TargetError
from sstf.targets import SplitDecoder, Target, load_target
from sstf.targets import split as split_module

SMALL: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
    eos_token_id=None, pad_token_id=0, bos_token_id=1,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def build(name: str, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Target:
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{name}{text}Config")(**(SMALL | fields))
        return Target(name, getattr(transformers, f"{name}ForCausalLM")(config), tokenizer)


@torch.inference_mode()
def check(target: Target, exit_layer: int) -> None:
    """40 tokens in one pass, against the shallow part token by token and the deep part in two passes."""
    split = SplitDecoder(target, exit_layer)
    ids = torch.randint(3, 299, (1, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40)[None]
    whole = target.decoder(ids, output_hidden_states=True, use_cache=False)
    cache = target.new_cache(40)
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[None]

    def mask(rows: slice) -> Any:
        return target.masks(seen[:, rows, : rows.stop], positions[:, rows])

    states = []
    for t in range(40):
        cache.write_behind(t)
        row = slice(t, t + 1)
        states.append(split.shallow(ids[:, row], positions[:, row], mask(row), cache))
    shallow = torch.cat(states, 1)
    torch.testing.assert_close(shallow, whole.hidden_states[exit_layer], atol=2e-5, rtol=1e-4)
    for rows in (slice(0, 25), slice(25, 40)):
        cache.write_behind(rows.start)
        found = split.deep(shallow[:, rows], positions[:, rows], mask(rows), cache)
        torch.testing.assert_close(found, whole.last_hidden_state[:, rows], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("exit_layer", [1, 5, 7])
def test_the_parts_of_llama(exit_layer: int, tiny_target: Target) -> None:
    check(tiny_target, exit_layer)


@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Gemma2", {"sliding_window": 8, "layer_types": MIXED, "head_dim": 16}),  # scales its embeddings as it reads
        ("Gemma3", {"sliding_window": 8, "layer_types": MIXED, "head_dim": 16}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_layers_of_different_kinds_stay_in_their_places(
    name: str, fields: dict[str, Any], exit_layer: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    check(build(name, tokenizer, **fields), exit_layer)


def test_weights_are_shared_and_the_whole_stays_whole(tiny_target: Target) -> None:
    before = {name: id(module) for name, module in tiny_target.decoder.named_modules()}
    split = SplitDecoder(tiny_target, 3)
    mine = {id(p) for part in (split._shallow, split._deep) for p in part.parameters()}
    assert mine == {id(p) for p in tiny_target.decoder.parameters()}
    assert {name: id(module) for name, module in tiny_target.decoder.named_modules()} == before
    assert sum(id(p) in mine for p in split._shallow.layers.parameters()) == 3 * len(  # type: ignore[union-attr]
        list(tiny_target.layers[0].parameters())
    )


def test_embeddings_that_are_scaled_on_the_way_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build("Granite", tokenizer, embedding_multiplier=12.0)
    with pytest.raises(TargetError, match=r"GraniteModel cannot be run in two parts .*differs by .*% from that of the"):
        SplitDecoder(target, 2)


def test_a_small_difference_is_refused(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof would notice a norm between the parts."""

    class Almost(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.02

    right = split_module._part

    def wrong(target: Target, kept: range, normed: bool) -> nn.Module:
        part = right(target, kept, normed)
        if not normed:
            part._modules["norm"] = Almost()
        return part

    monkeypatch.setattr(split_module, "_part", wrong)
    with pytest.raises(TargetError, match="differs by"):
        SplitDecoder(tiny_target, 3)


def test_a_recurrent_state_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build("Lfm2", tokenizer, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    with pytest.raises(TargetError, match="Lfm2 keeps a recurrent state: its first layers cannot draft"):
        SplitDecoder(target, 1)


def test_layers_on_the_disk_are_refused(tiny_target_folder: Path) -> None:
    target = load_target(str(tiny_target_folder), dtype="float32", device="cpu", device_map="disk")
    with pytest.raises(TargetError, match="has layers outside of memory: its first layers cannot draft"):
        SplitDecoder(target, 2)
