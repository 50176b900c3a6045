"""What is trained, for people to look at: the tokens of a few samples, in the terminal or as one HTML file.

A wrong loss mask is the most frequent reason for a head that learns nothing, and one look finds it. Trained tokens,
context and special tokens differ in colour and, for those who see or print none, in marks: `⟦` stands before the first
token that is trained after a prompt and `⟧` after the last one. White space and invisible characters are made visible.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sstf.data.preview_page import page
from sstf.types import TokenSample

PART = "⋯"  # a token that holds a piece of a character; a later one completes it
TERMINAL_SAMPLES, TERMINAL_RUN = 3, 240
HTML_SAMPLES, HTML_RUN = 100, 4000

# A character has at most 4 bytes, but a token may hold the end of one and the beginning of the next.
_LONGEST_CHARACTER = 8
_SHOWN = {" ": "·", "\n": "↵\n", "\t": "⇥   ", "\r": "␍"}
_JOINER = "\u200d"  # of emoji
_TRAINED, _SPECIAL, _UNKNOWN, _PART, _GAP = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Piece:
    """One token as it is shown.

    `text` is what it adds to the text, empty for the first tokens of a character that takes several: these are
    `part` of the text of a later one. An `unknown` id is in no vocabulary and has no text.
    """

    position: int
    id: int
    text: str
    trained: bool
    special: bool
    unknown: bool
    part: str | None = None

    @property
    def shown(self) -> str:
        """The text with all white space visible."""
        return f"⟨{self.id}?⟩" if self.unknown else PART if self.part is not None else visible(self.text) or "∅"


@dataclass(frozen=True)
class Gap:
    """Tokens that are left out, all trained or all context."""

    tokens: int
    trained: bool

    @property
    def shown(self) -> str:
        """Says how many."""
        return f" [… {self.tokens:,} {'trained' if self.trained else 'context'} tokens not shown …] "


def choose(sources: Sequence[str], limit: int) -> list[int]:
    """Indices of at most `limit` samples, taken in turn from the sources so that each is seen, in their order.

    >>> choose(["a", "a", "a", "a", "b"], 3)
    [0, 1, 4]
    """
    # The rank of a sample within its own source comes first.
    ranks: dict[str, int] = {}
    order = []
    for index, source in enumerate(sources):
        ranks[source] = ranks.get(source, -1) + 1
        order.append((ranks[source], index))
    return sorted(index for _, index in sorted(order)[:limit])


def pieces(tokenizer: PreTrainedTokenizerBase, sample: TokenSample) -> list[Piece]:
    """Every token of a sample with the text that it adds; the texts joined are the decoded sample."""
    special = special_ids(tokenizer)
    texts = token_texts(tokenizer, sample.input_ids)
    found: list[Piece] = []
    for position in reversed(range(len(texts))):
        token, text = sample.input_ids[position], texts[position]
        whole = None
        if text == "" and found and not found[-1].unknown:
            whole = found[-1].text or found[-1].part
        found.append(
            Piece(
                position,
                token,
                text or "",
                trained=sample.loss_mask[position],
                special=token in special,
                unknown=text is None,
                part=whole,
            )
        )
    return found[::-1]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str | None]:
    """What each token adds to the text: "" until a character is complete, None for an id that is in no vocabulary.

    A token is decoded behind its predecessors, since some tokenizers drop the space before a first word.
    """
    texts: list[str | None] = []
    context: list[int] = []  # decoded already
    waiting: list[int] = []  # not yet a whole character
    size, special = len(tokenizer), special_ids(tokenizer)

    def flush() -> str:
        nonlocal context, waiting
        text = _decode(tokenizer, context + waiting)[len(_decode(tokenizer, context)) :]
        context, waiting = waiting, []
        return text

    for token in ids:
        known = 0 <= token < size
        if waiting and (token in special or not known):
            texts[-1] = flush()  # a character that was cut
        if not known:
            texts.append(None)
            continue
        waiting.append(token)
        incomplete = _decode(tokenizer, context + waiting).endswith("\ufffd")
        texts.append("" if incomplete and len(waiting) < _LONGEST_CHARACTER else flush())
    if waiting:
        texts[-1] = flush()
    return texts


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens, end-of-turn markers among them."""
    added = (token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special)
    return {*tokenizer.all_special_ids, *added}


def visible(text: str) -> str:
    """Spaces as `·`, line breaks as `↵`, tabs as `⇥`, and by its code whatever else has no picture of its own.

    Control characters could drive a terminal, and marks of direction could show a text in another order.
    """
    shown = "".join(map(_visible, text))
    # An accent by itself would sit on the token before.
    return "◌" + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def print_preview(
    console: Console,
    samples: Sequence[TokenSample],
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = TERMINAL_SAMPLES,
) -> None:
    """Print `limit` samples; a run of trained or of context tokens longer than 240 is shown by its two ends.

    Args:
        console: With or without colour.
        samples: Of the data stage.
        sources: The source of each sample.
        tokenizer: Their tokenizer.
        limit: How many samples, taken in turn from the sources.
    """
    chosen = choose(sources, limit)
    legend = Text("context ")
    legend.append("⟦trained⟧", "black on green")
    legend.append(" ")
    legend.append("special", "bold magenta")
    console.print(legend, Text(f"; {len(chosen):,} of {len(samples):,} samples"), sep="", end="\n\n")
    for index in chosen:
        sample = samples[index]
        console.print(Text(f"{visible(sample.id)} ({visible(sources[index])}): {_figures(sample)}", "bold"))
        console.print(_as_text(list(_shortened(pieces(tokenizer, sample), TERMINAL_RUN))), end="\n\n")


def preview_html(
    samples: Sequence[TokenSample],
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    limit: int = HTML_SAMPLES,
) -> str:
    """One self-contained page with `limit` samples; arguments as for `print_preview`, `title` names the data.

    Ids, positions and vocabulary entries of all tokens shown are in it; it loads nothing from elsewhere.
    """
    chosen = choose(sources, limit)
    texts: dict[tuple[str, str], int] = {}
    vocabulary: dict[int, str] = {}
    shown = []
    shortened = 0
    for index in chosen:
        sample = samples[index]
        entries = list(_shortened(pieces(tokenizer, sample), HTML_RUN))
        shortened += any(isinstance(entry, Gap) for entry in entries)
        for entry in entries:
            if isinstance(entry, Piece) and entry.id not in vocabulary:
                token = None if entry.unknown else tokenizer.convert_ids_to_tokens(entry.id)
                vocabulary[entry.id] = "not in the vocabulary" if token is None else str(token)
        shown.append(
            {
                "id": sample.id,
                "source": sources[index],
                "tokens": len(sample.input_ids),
                "trained": sum(sample.loss_mask),
                "turns": _turns(sample),
                **_columns(entries, texts),
            }
        )
    summary = f"{len(chosen):,} of {len(samples):,} samples"
    if len(chosen) < len(samples):
        summary += f", taken in turn from {len(set(sources))} sources" if len(set(sources)) > 1 else ", the first ones"
    if shortened:
        summary += f"; {shortened:,} of them shortened, where more than {HTML_RUN:,} tokens follow of one kind"
    return page(title, summary + ".", {"samples": shown, "texts": list(texts), "vocabulary": vocabulary})


def _columns(entries: Sequence[Piece | Gap], texts: dict[tuple[str, str], int]) -> dict[str, Any]:
    """`ids`, `texts` (numbers of entries of the table `texts`) and `flags` of one sample, for the page's script."""
    ids, numbers, flags = [], [], []
    for entry in entries:
        if isinstance(entry, Gap):
            ids.append(entry.tokens)
            text = (entry.shown, "")
            flags.append(_GAP | _TRAINED * entry.trained)
        else:
            ids.append(entry.id)
            text = (entry.shown, repr(entry.text) if entry.part is None else f"part of {entry.part!r}")
            kinds = (_TRAINED, entry.trained), (_SPECIAL, entry.special), (_UNKNOWN, entry.unknown)
            flags.append(sum(bit for bit, is_set in kinds if is_set) | (0 if entry.part is None else _PART))
        numbers.append(texts.setdefault(text, len(texts)))
    return {"ids": ids, "texts": numbers, "flags": flags}


def _as_text(entries: Sequence[Piece | Gap]) -> Text:
    text = Text()
    for trained, run in groupby(entries, key=lambda entry: entry.trained):
        tokens = list(run)
        if trained:
            text.append("⟦", "bold green")
        for number, entry in enumerate(tokens):
            text.append(entry.shown, _style(entry, number))
        if trained:
            text.append("⟧", "bold green")
    return text


def _style(entry: Piece | Gap, number: int) -> str:
    if isinstance(entry, Gap):
        return "dim italic"
    if entry.unknown:
        return "bold white on red"
    if entry.special:
        return "bold white on magenta" if entry.trained else "bold magenta"
    if not entry.trained:
        return "" if number % 2 else "underline"  # tokens of one word can be told apart
    if number == 0:
        return "bold black on yellow"  # the first prediction after a prompt
    return "black on green" if number % 2 else "black on bright_green"


def _shortened(all_pieces: Sequence[Piece], longest: int) -> Iterator[Piece | Gap]:
    """Leaves out the middle of runs of more than `longest` trained, or context, tokens; their ends are kept."""
    for trained, run in groupby(all_pieces, key=lambda piece: piece.trained):
        tokens = list(run)
        if len(tokens) <= longest:
            yield from tokens
            continue
        head = longest // 2
        tail = len(tokens) - (longest - head)
        yield from tokens[:head]
        yield Gap(tail - head, trained)
        yield from tokens[tail:]


def _figures(sample: TokenSample) -> str:
    count, trained = len(sample.input_ids), sum(sample.loss_mask)
    share = f" ({trained / count:.1%})" if count else ""
    return f"{count:,} tokens, {trained:,} trained{share}, trained turns: {_turns(sample):,}"


def _turns(sample: TokenSample) -> int:
    return sum(trained for trained, _ in groupby(sample.loss_mask))


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if character == _JOINER or unicodedata.category(character)[0] not in "CZ":
        return character
    return f"‹U+{ord(character):04X}›"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
