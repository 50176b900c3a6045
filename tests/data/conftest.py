"""The stand-in for the target, over the tokenizer of `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def make_sampler(tokenizer: PreTrainedTokenizerBase) -> Callable[..., FakeSampler]:
    # "H" and "i" are drawn as two tokens though the tokenizer would merge them: ids that text alone would lose.
    letters = [int(i) for i in tokenizer.convert_tokens_to_ids(list("Hiabcdefgh"))]

    def make(fail_at_call: int | None = None) -> FakeSampler:
        return FakeSampler(letters, int(tokenizer.eos_token_id), fail_at_call)

    return make
