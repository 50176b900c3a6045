from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from sstf.data.rows import PlainText, Pretokenised
from sstf.data.samples import samples
from sstf.errors import DataError
from sstf.types import Conversation, Message, TokenSample


def test_plain_text_is_trained_after_its_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    h, i = tokenizer.convert_tokens_to_ids(["Hello", "Hi"])
    tokenizer.chat_template = None
    assert samples(PlainText("p", "HelloHi", "test"), tokenizer, "every") == [TokenSample("p", [h, i], [False, True])]


def test_plain_text_begins_as_the_tokenizer_begins_it(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, hello = tokenizer.convert_tokens_to_ids(["<|im_start|>", "Hello"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    (sample,) = samples(PlainText("p", "Hello", "test"), tokenizer, "every")
    assert (sample.input_ids, sample.loss_mask) == ([bos, hello], [False, True])


def test_token_ids_stay_as_they_are_within_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    top = len(tokenizer) - 1
    item = Pretokenised("p", [3, top, 4], [False, True, False], "test")
    assert samples(item, tokenizer, "each") == [TokenSample("p", [3, top, 4], [False, True, False])]
    with pytest.raises(DataError, match=rf"p \(test\) holds token {top + 1}, expected ids below {top + 1}, the size"):
        samples(Pretokenised("p", [3, top + 1], [False, True], "test"), tokenizer, "every")


def test_conversation_has_one_sample_or_one_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Message("user", "Hi"), Message("assistant", "A"), Message("user", "?"), Message("assistant", "B"))
    item = Conversation("c", turns, "test")
    assert [sum(s.loss_mask) for s in samples(item, tokenizer, "every")] == [4]
    assert [(s.id, sum(s.loss_mask)) for s in samples(item, tokenizer, "last")] == [("c", 2)]
    assert [(s.id, sum(s.loss_mask)) for s in samples(item, tokenizer, "each")] == [("c#1", 2), ("c#2", 2)]
