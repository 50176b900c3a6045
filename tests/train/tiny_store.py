"""Feature stores of the tiny target's own answers, and trainings on them that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import Eagle3Config, Eagle3Method
from sstf.targets import Target
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.types import TokenSample

METHOD = Eagle3Config(ttt_steps=3, draft_vocab_size=200)
PROMPT = 6
PACE = ("tokens_per_second", "waiting_share", "eta_seconds", "memory_gib")


def pinned_target(tokenizer: PreTrainedTokenizerBase) -> Target:
    """8 layers, hidden size 64, vocabulary 300, float32, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
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
    return Target("pinned", LlamaForCausalLM(config), tokenizer)


def own_answers(target: Target, count: int, seed: int = 1) -> list[TokenSample]:
    """Greedy answers of 10 to 21 tokens to random prompts, with what a head can learn from them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        ids = torch.randint(3, 290, (PROMPT,), generator=generator).tolist()
        for _ in range(10 + i % 12):
            logits = target.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        samples.append(TokenSample(f"c{i}", ids, [False] * PROMPT + [True] * (len(ids) - PROMPT)))
    return samples


def make_store(target: Target, samples: list[TokenSample], folder: Path) -> FeatureStore:
    spec = Eagle3Method(METHOD).feature_spec(target.spec)
    extract(
        target,
        samples,
        spec,
        ExtractConfig(codec="bf16", compression="none", shard_tokens=256, batch_tokens=128),
        folder,
        NoProgress(),
    )
    return FeatureStore(folder)


def train_config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "steps": 12,
        "step_tokens": 64,
        "optimizer": {"learning_rate": 2e-3},
        "precision": "fp32",
        "validation_conversations": 4,
        "validate_every": 3,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return TrainConfig(**(fields | changes))


def make_trainer(store: FeatureStore, folder: Path, config: TrainConfig | None = None, seed: int = 0) -> Trainer:
    return Trainer(store, Eagle3Method(METHOD), METHOD, config or train_config(), folder, seed)


def train(store: FeatureStore, folder: Path, config: TrainConfig | None = None) -> dict[str, Any]:
    return make_trainer(store, folder, config).run(NoProgress(), "tiny", {})


def metrics(folder: Path) -> list[dict[str, float]]:
    """The logged figures, without those of time and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in PACE} for row in rows]


def head_bytes(folder: Path) -> bytes:
    return (folder / "head" / "head.safetensors").read_bytes()


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.module.head.named_parameters()}
