"""Text of token ids as they come: in whole characters, without stop strings, and without reading the whole text anew.

A token's text may depend on the ones before it, and a character may take several tokens. So a window of the last tokens
is decoded with and without the new ones, and what comes on top is the new text (as in vLLM's and TGI's incremental
detokenisers). The window moves on where the text ends in a whole character.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
WINDOW = 8  # tokens before the new ones that are decoded with them
BYTES = 4  # of a character, at most, and so the tokens that it may take


class TextStream:
    """Gives out text; holds back what may be the beginning of a stop string.

    Args:
        tokenizer: the target's.
        stop: the text ends before the first of them. Whether one was completed is for the decoder to say.
        skip_special: leave out the text of special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        self.tokenizer, self.stop, self.skip_special = tokenizer, tuple(stop), skip_special
        self._window: list[int] = []  # tokens whose text was read
        self._new: list[int] = []  # tokens that may end inside a character
        self._held = ""  # text that was read and not given out

    def push(self, tokens: Sequence[int]) -> str:
        """What can be given out now and could not before."""
        for token in tokens:
            self._new.append(token)
            # What does not become a character within `BYTES` tokens is none.
            incomplete = self._text(self._new).endswith(INCOMPLETE)
            self._read(max(0, len(self._new) - BYTES + 1) if incomplete else len(self._new))
        ready = len(self._held) - _held_back(self._held, self.stop)
        given, self._held = self._held[:ready], self._held[ready:]
        return given

    def finish(self, stopped: bool = False) -> str:
        """The rest, with characters that stayed incomplete; up to the stop string if the decoder found one."""
        self._read(len(self._new))
        found = [at for string in self.stop if (at := self._held.find(string)) >= 0] if stopped else []
        return self._held[: min(found, default=len(self._held))]

    def _read(self, count: int) -> None:
        """Take the text of the first `count` new tokens."""
        self._held += self._text(self._new[:count])
        self._window, self._new = [*self._window, *self._new[:count]][-WINDOW:], self._new[count:]

    def _text(self, new: list[int]) -> str:
        return self._decode([*self._window, *new])[len(self._decode(self._window)) :] if new else ""

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters from the first place on where one of the strings stands, or may begin.

    >>> _held_back("one, tw", ["two"]), _held_back("one", ["two"])
    (2, 0)
    """
    for start in range(len(text)):
        rest = text[start:]
        if any(rest.startswith(string) or string.startswith(rest) for string in stop):
            return len(rest)
    return 0
