"""Models small enough to run in milliseconds."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 20, **changes: object) -> LlamaForCausalLM:
    """Random weights, large enough that the next token depends on the whole prefix and its distribution is uneven.

    With the default seed some greedy answers run into the end token.
    """
    torch.manual_seed(seed)
    fields: dict[str, object] = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is forgotten or taken twice
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model
