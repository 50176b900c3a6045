"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BYTES = 4  # of a character, at most: so many tokens may be needed for one


class StopStrings:
    """Finds the token that completes one of some strings in what was emitted; the prompt does not count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.window = BYTES * max(map(len, self.strings)) + 8  # tokens that surely hold the longest

    def cut(self, before: Sequence[int], new: Sequence[int]) -> int | None:
        """How many of `new` remain when the text ends with the first stop string; None if there is none.

        Args:
            before: what was emitted earlier.
            new: what would follow.
        """
        tokens = [*before[-self.window :], *new]
        for count in range(1, len(new) + 1):
            end = len(tokens) - len(new) + count
            text = str(self.tokenizer.decode(tokens[max(0, end - self.window) : end]))
            if any(string in text for string in self.strings):
                return count
        return None
