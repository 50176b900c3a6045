"""The target writes the requests as well: no data set needed, and the topics are the ones it knows.

The chat template is rendered up to the point where a user speaks, and the target goes on from there. Some of what it
writes is no request: cut off, a few letters, or one of the openings that it repeats endlessly. Those are dropped, and
counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from sstf.data.chat_template import user_turn_prefix
from sstf.data.config import SelfWrittenSource
from sstf.data.groups import GroupFiles
from sstf.data.minhash import NearDuplicates
from sstf.data.progress import Progress
from sstf.data.regenerate import answer_text
from sstf.data.sampler import Sampler, derive_seed
from sstf.data.template import special_strings
from sstf.errors import DataError
from sstf.types import Conversation, Message, SamplingParams

OPENING_CHARACTERS = 24
BARREN_DRAWS = 64


@dataclass(frozen=True)
class WrittenPrompts:
    """Requests that were kept, and what became of the other draws."""

    conversations: list[Conversation]
    drawn: int
    dropped: dict[str, int]


def write_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    config: SelfWrittenSource,
    files: GroupFiles,
    progress: Progress,
    system_prompt: str | None = None,
    near_duplicates: float | None = None,
) -> WrittenPrompts:
    """Draw requests in groups until `config.conversations` of them are kept.

    Args:
        tokenizer: With a chat template.
        sampler: The target.
        config: How many, how drawn, what is dropped.
        files: Where finished groups are kept; a later run goes on after them.
        progress: Shows kept requests and tokens.
        system_prompt: Rendered before the request; it is not part of the returned conversations.
        near_duplicates: Jaccard similarity from which a request is a repeat of an earlier one; None: equal texts only.

    Returns:
        Exactly `config.conversations` conversations of one user turn.

    Raises:
        DataError: Whole groups, 64 draws or more in a row, kept nothing.
    """
    # What is drawn does not depend on how many are wanted or which are dropped: groups on disk serve any such setting.
    filters = {"slots", "conversations", "min_characters", "max_same_opening"}
    depends_on = [config.model_dump(mode="json", exclude=filters), system_prompt]
    prefix = user_turn_prefix(tokenizer, system_prompt)
    chosen = _Filter(config, special_strings(tokenizer), NearDuplicates(near_duplicates or 1.0))
    group = barren = 0
    with (
        progress.start("requests by the target", config.conversations, "requests") as done,
        progress.start("request tokens", None, "tokens") as tokens,
    ):
        while len(chosen.texts) < config.conversations:
            rows = files.read(group, depends_on)
            if rows is None:
                rows = _draw(tokenizer, sampler, config, prefix, group, tokens.advance)
                files.write(group, depends_on, rows)
            before = len(chosen.texts)
            # The filter is run again over groups from disk: which openings count as repeats depends on all of them.
            for row in rows:
                chosen.add(row["text"], row["finished"])
            kept = len(chosen.texts) - before
            done.advance(kept)
            barren = 0 if kept else barren + len(rows)
            if barren >= BARREN_DRAWS:
                reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.dropped.most_common())
                raise DataError(
                    f"The target wrote no usable request in {barren} draws, with {before} of {config.conversations} "
                    f"kept; dropped: {reasons}. Use a data set as source, or fewer conversations."
                )
            group += 1
    conversations = [
        Conversation(f"self_written:{number}", (Message("user", text),), "self_written")
        for number, text in enumerate(chosen.texts, start=1)
    ]
    return WrittenPrompts(conversations, chosen.drawn, dict(chosen.dropped))


def _draw(
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    config: SelfWrittenSource,
    prefix: list[int],
    group: int,
    on_token: Callable[[int], None],
) -> list[dict[str, Any]]:
    params = [
        SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_prompt_tokens,
            seed=derive_seed("request", config.seed, group * config.group_size + row),
        )
        for row in range(config.group_size)
    ]
    results = sampler.sample([prefix] * config.group_size, params, config.slots, on_token)
    return [{"text": answer_text(tokenizer, sampled).strip(), "finished": sampled.finished} for sampled in results]


@dataclass
class _Filter:
    """Keeps usable requests, in the order in which they were drawn."""

    config: SelfWrittenSource
    special: list[str]
    known: NearDuplicates
    texts: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    drawn: int = 0
    _openings: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, finished: bool) -> None:
        if len(self.texts) == self.config.conversations:
            return
        self.drawn += 1
        reason = self._why_not(text, finished)
        if reason is not None:
            self.dropped[reason] += 1
            return
        self._openings[_opening(text)] += 1
        self.texts.append(text)

    def _why_not(self, text: str, finished: bool) -> str | None:
        if not finished:
            return "not finished"
        if any(special in text for special in self.special):
            return "special token inside"
        if len(text) < self.config.min_characters:
            return "too short"
        if self._openings[_opening(text)] >= self.config.max_same_opening:
            return "repeated opening"
        # Last: a text that is dropped for another reason must not be remembered.
        return "duplicate" if self.known.add(text) is not None else None


def _opening(text: str) -> str:
    return text[:OPENING_CHARACTERS].casefold()
