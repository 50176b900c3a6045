"""Writes EAGLE-3 heads as others publish them, from their key lists alone: nothing here knows the project's formats."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, VOCAB, DRAFT, INNER, HEADS, KV_HEADS, DIM = 64, 300, 100, 128, 4, 2, 16  # of tests' tiny target


@dataclass
class Published:
    """A checkpoint that can still be changed; `target_ids` are those of the draft vocabulary."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    target_ids: Tensor = field(default_factory=lambda: torch.arange(0, VOCAB, 3))

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "model.safetensors")
        return folder


def weights(
    layer: str, inner: int = INNER, heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM
) -> dict[str, Tensor]:
    """Tensors of a head that reads three layers, by the names of a publisher who calls its layer `layer`."""
    draw = torch.Generator().manual_seed(11)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) * 0.1).to(torch.bfloat16)

    def norm() -> Tensor:
        return (1 + 0.2 * torch.randn(HIDDEN, generator=draw)).to(torch.bfloat16)

    target_ids = torch.arange(0, VOCAB, 3)
    marked = torch.zeros(VOCAB, dtype=torch.bool)
    marked[target_ids] = True
    return {
        "fc.weight": matrix(HIDDEN, 3 * HIDDEN),
        f"{layer}.self_attn.q_proj.weight": matrix(heads * dim, 2 * HIDDEN),
        f"{layer}.self_attn.k_proj.weight": matrix(kv_heads * dim, 2 * HIDDEN),
        f"{layer}.self_attn.v_proj.weight": matrix(kv_heads * dim, 2 * HIDDEN),
        f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, heads * dim),
        f"{layer}.mlp.gate_proj.weight": matrix(inner, HIDDEN),
        f"{layer}.mlp.up_proj.weight": matrix(inner, HIDDEN),
        f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, inner),
        f"{layer}.hidden_norm.weight": norm(),
        f"{layer}.input_layernorm.weight": norm(),
        f"{layer}.post_attention_layernorm.weight": norm(),
        "norm.weight": norm(),
        "lm_head.weight": matrix(DRAFT, HIDDEN),
        "d2t": target_ids - torch.arange(DRAFT),
        "t2d": marked,
    }


def eagle() -> Published:
    """As in SafeAILab/EAGLE: no layer ids, no theta, no head_dim."""
    return Published(
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "max_position_embeddings": 2048,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "num_hidden_layers": 1,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": VOCAB,
            "draft_vocab_size": DRAFT,
        },
        weights("midlayer"),
    )


def specforge(ids: list[int]) -> Published:
    """As SpecForge writes for SGLang: layer ids in `eagle_config`."""
    head = eagle()
    head.config |= {"head_dim": DIM, "rope_theta": 10000.0, "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    return head


def speculators(ids: list[int]) -> Published:
    """As speculators 0.9 writes: the layer's configuration in a part of its own, `layers.0`, embeddings beside."""
    return Published(
        {
            "architectures": ["Eagle3DraftModel"],
            "auto_map": {"": "config.Eagle3SpeculatorConfig"},
            "draft_vocab_size": DRAFT,
            "dtype": "bfloat16",
            "eagle_aux_hidden_state_layer_ids": ids,
            "embed_requires_grad": False,
            "fc_norm": False,
            "norm_before_fc": False,
            "norm_before_residual": True,
            "norm_output": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "accept_tolerance": 0.0,
                        "proposal_type": "greedy",
                        "speculative_tokens": 3,
                        "verifier_accept_k": 1,
                    }
                ],
                "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "somebody/tiny"},
            },
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            "transformer_layer_config": {
                "attention_bias": False,
                "head_dim": DIM,
                "hidden_act": "silu",
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "max_position_embeddings": 256,
                "mlp_bias": False,
                "model_type": "llama",
                "num_attention_heads": HEADS,
                "num_hidden_layers": 1,
                "num_key_value_heads": KV_HEADS,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                "tie_word_embeddings": True,  # copied from the target; it says nothing of the head
                "vocab_size": VOCAB,
            },
        },
        weights("layers.0"),
    )
