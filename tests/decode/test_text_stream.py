"""Text in pieces against the whole text decoded at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sstf.decode.text_stream import TextStream

TEXTS = ["Hello", "é", "日本語 and 🙂!", "a�b", "🙂🙂�", "\n\n x\t", "", "<|im_start|>user\nHi<|im_end|>", "x" * 300]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_make_the_text(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> None:
    ids = tokenizer(text)["input_ids"]
    for skip in (True, False):
        stream = TextStream(tokenizer, skip_special=skip)
        pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
        assert all("�" not in piece for piece in pieces) or "�" in text
        assert "".join([*pieces, stream.finish(False)]) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in tokenizer("a🙂é")["input_ids"]] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.finish(False) == ""


@settings(deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_text(tokenizer_for_all: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    tokenizer = tokenizer_for_all
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    stream, given_out, start = TextStream(tokenizer), "", 0
    while start < len(ids):
        size = data.draw(st.integers(1, 5))
        given_out += stream.push(ids[start : start + size])
        start += size
        # What is out is a beginning of the text as it will be, and lags behind by one character at most.
        known = tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert known.startswith(given_out.rstrip("�")) and len(known) - len(given_out) <= 4
    assert given_out + stream.finish(False) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def tokenizer_for_all(tokenizer_folder: object) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab##cd", ("##",), "ab"),
        ("aHellob Hello", ("lob",), "aHel"),  # begins inside a token
        ("so xHello", ("xHe",), "so "),  # ends inside one
        ("a中文b", ("中",), "a"),  # three bytes, three tokens
        ("one two", ("two", "ne"), "o"),  # the first in the text, not the first named
        ("Hello", ("Hello",), ""),
    ],
)
def test_stop_strings_stay_inside(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], expected: str
) -> None:
    """Token by token; the decoder ends the text with the token that completes one, whatever follows in `text`."""
    stream, ids, out = TextStream(tokenizer, stop), tokenizer(text)["input_ids"], ""
    for count, token in enumerate(ids, start=1):
        out += stream.push([token])
        assert expected.startswith(out)
        if any(string in tokenizer.decode(ids[:count]) for string in stop):
            break
    assert out + stream.finish(True) == expected


def test_a_beginning_is_held_back_until_it_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ("xyz", "y!"))
    pieces = [stream.push([token]) for token in tokenizer("axyxy?xy")["input_ids"]]
    assert pieces == ["a", "", "", "xy", "", "xy?", "", ""]
    assert stream.finish(False) == "xy"
