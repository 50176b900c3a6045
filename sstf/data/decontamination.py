"""Training texts that hold an evaluation prompt: a head that has seen the prompt is measured on its memory.

By n-gram overlap, as for GPT-3 (Brown et al. 2020, appendix C) and Llama: a text that shares 13 words in a row with a
prompt is contaminated, case and punctuation aside. What is shorter than that is told by length:

| words of the prompt | a text is contaminated if it |
|---|---|
| 13 and more | holds any 13 of them in a row |
| 8 to 12 | holds all of them in a row (8 is the shortest n that GPT-3 used) |
| up to 7 | IS the prompt, word by word, and nothing else |

The last line is because a few words in a row ("what is the capital of france") turn up in texts that have nothing to do
with a suite; a conversation loses nothing by holding them, but one that asks exactly this question is the suite's.

A 13-gram that many prompts share is the suite's instruction ("answer the following question with ..."), not its
content; those are left out of the index, as GPT-3 leaves out n-grams found in more than 10 documents.

Paraphrases and translations are not found (Yang et al. 2023, "Rethinking Benchmark and Contamination"). In Chinese and
Japanese a character counts as a word, so 13 in a row are about 8 words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sstf.data.words import words

GRAM = 13
SHORTEST = 8
TEMPLATE = 10  # a 13-gram of more prompts than this is an instruction
EXAMPLES = 5  # ids a report lists for each suite

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """The prompt that was found: `prompt` counts from 0 within its suite; `words` is what the text shares with it."""

    suite: str
    prompt: int
    words: str


@dataclass
class DecontaminationReport:
    """How many texts were looked at, and by suite how many hold one of its prompts and the first few of their ids."""

    checked: int = 0
    matched: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, match: Match | None) -> None:
        """Count the conversation `name`."""
        self.checked += 1
        if match is None:
            return
        self.matched[match.suite] = self.matched.get(match.suite, 0) + 1
        examples = self.examples.setdefault(match.suite, [])
        if len(examples) < EXAMPLES:
            examples.append(name)


class Decontaminator:
    """Knows the prompts of some suites and finds them in texts."""

    def __init__(self, suites: Mapping[str, Sequence[str]], n: int = GRAM) -> None:
        """`suites` maps a name to the texts of its prompts; `n` is the number of words in a row, at least 8."""
        if n < SHORTEST:
            raise ValueError(f"n is {n}, expected at least {SHORTEST}: fewer words in a row are no evidence")
        prompts = [(suite, i, tuple(words(text))) for suite, texts in suites.items() for i, text in enumerate(texts)]
        spread = Counter(gram for _, _, prompt in prompts for gram in set(_grams(prompt, n)))
        self._whole: dict[Gram, tuple[str, int]] = {}
        self._parts: dict[int, dict[Gram, tuple[str, int]]] = {}  # by the number of words
        for suite, index, prompt in prompts:
            if not prompt:
                continue
            self._whole.setdefault(prompt, (suite, index))
            if len(prompt) >= SHORTEST:
                length = min(n, len(prompt))
                parts = self._parts.setdefault(length, {})
                for gram in _grams(prompt, length):
                    if spread[gram] <= TEMPLATE:
                        parts.setdefault(gram, (suite, index))

    def match(self, text: str) -> Match | None:
        """The first prompt that `text`, one message, holds; None if it is clean."""
        own = tuple(words(text))
        if own in self._whole:
            return Match(*self._whole[own], " ".join(own))
        for length, parts in self._parts.items():
            for gram in _grams(own, length):
                if gram in parts:
                    return Match(*parts[gram], " ".join(gram))
        return None

    def match_any(self, texts: Iterable[str]) -> Match | None:
        """The first match among the messages of a conversation."""
        return next((match for text in texts if (match := self.match(text)) is not None), None)


def _grams(own: Gram, length: int) -> Iterable[Gram]:
    return (own[i : i + length] for i in range(len(own) - length + 1))
