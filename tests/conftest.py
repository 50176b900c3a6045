"""A tokenizer small enough to derive ids by hand, and a target small enough to run in milliseconds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sstf.targets import Target, load_target

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words that are one token; `Ċ` is the byte-level name of a line break.
WORDS = ["user", "assistant", "system", "Hello", "Hi", "ĊĊ"]

torch.set_num_threads(1)  # the tensors here are too small to share


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow proofs run while there is time (`.ci/run`)."""
    until = os.environ.get("SSTF_TESTS_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("NOT RUN: no time left")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
                vocab[word[: end + 1]] = len(vocab)
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Without GPT-2's word pattern, so that merges cross the boundary between a prompt and its answer.
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """A fresh one for each test: tests change its chat template."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_target_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-layer Llama, hidden size 64, 4 heads over 2 key/value heads, vocabulary 300, fp32, with the tokenizer."""
    folder = tmp_path_factory.mktemp("target") / "tiny"
    tiny_llama().save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_target_folder: Path) -> Target:
    """Shared by all tests: change it through `monkeypatch` only."""
    return load_target(str(tiny_target_folder), dtype="float32", device="cpu")
