"""A tokenizer small enough to derive ids by hand, and the stand-in for the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_sampler import FakeSampler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words that are one token; `Ċ` is the byte-level name of a line break.
WORDS = ["user", "assistant", "system", "Hello", "Hi", "ĊĊ"]


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


@pytest.fixture
def make_sampler(tokenizer: PreTrainedTokenizerBase) -> Callable[..., FakeSampler]:
    # "H" and "i" are drawn as two tokens though the tokenizer would merge them: ids that text alone would lose.
    letters = [int(i) for i in tokenizer.convert_tokens_to_ids(list("Hiabcdefgh"))]

    def make(fail_at_call: int | None = None) -> FakeSampler:
        return FakeSampler(letters, int(tokenizer.eos_token_id), fail_at_call)

    return make
