"""How many tokens a data set will give, from a sample of its conversations, and what the target has to write.

Where the answers are kept, the sample is rendered as the data stage does it. Where the target writes them, only the
pieces between the answers are known; the lengths of the answers come from a calibration, or are bounded by
`max_new_tokens`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer, item_to_json
from sstf.data.build import shortened
from sstf.data.chat_template import render, user_turn_prefix, with_system_prompt
from sstf.data.config import DataConfig, HubSource, KeepAnswers, RegenerateAnswers, SelfWrittenSource
from sstf.data.conversations import read_conversations
from sstf.data.known_sets import resolve
from sstf.data.rows import Item
from sstf.data.samples import samples as samples_of
from sstf.errors import DataError
from sstf.planning.interval import Interval, mean_of
from sstf.types import Conversation, Message, TokenSample

SAMPLE = 200  # conversations rendered: the mean of their lengths is known to some percent


@dataclass(frozen=True)
class Sketch:
    """A sample by the lengths of its pieces: `contexts[i]` untrained tokens stand before `answers[i]` trained ones."""

    contexts: tuple[int, ...]
    answers: tuple[int, ...]

    def lengths(self, max_length: int, answer: float | None = None) -> tuple[float, float]:
        """Tokens and trained tokens within `max_length`, with answers of `answer` tokens in place of its own."""
        tokens = trained = 0.0
        for context, own in zip(self.contexts, self.answers, strict=True):
            if tokens + context >= max_length:
                # A request that leaves no room is not asked; kept text is cut.
                return (tokens if answer is not None else float(max_length)), trained
            tokens += context
            written = min(own if answer is None else answer, max_length - tokens)
            tokens, trained = tokens + written, trained + written
        return tokens, trained


@dataclass(frozen=True)
class Look:
    """What a look at the source showed. `items` is how many conversations the run will have, None if unknown."""

    items: int | None
    sketches: list[list[Sketch]]  # of each sampled conversation
    samples: list[TokenSample]  # with kept answers: rendered and cut
    prompts: list[list[int]]  # with answers to be written: the first request of each, as the target is asked
    turns: float  # answers to be written, a conversation
    text_bytes: float  # a conversation, as it is kept in JSON


@dataclass(frozen=True)
class Volume:
    """Tokens of a run's data. None where something is unknown. `each` figures are means a conversation."""

    conversations: int | None
    sampled: int
    tokens_each: Interval
    trained_each: Interval
    answer: Interval | None  # tokens of one answer that the target writes
    request: Interval | None  # tokens of one request that the target writes
    written: Interval | None  # tokens to be written in all
    prompts: Interval | None  # tokens to be read before writing, in all
    longest: int  # of the sample
    cut_share: float  # of the sample's conversations
    distinct_trained: float | None  # different tokens among the trained ones, extrapolated
    text_bytes_each: float
    exact: bool = False  # the data stage is done, and this is what it gave

    @property
    def tokens(self) -> Interval | None:
        """In all."""
        return None if self.conversations is None else self.tokens_each.times(self.conversations)

    @property
    def trained(self) -> Interval | None:
        """Trained tokens in all."""
        return None if self.conversations is None else self.trained_each.times(self.conversations)

    @property
    def mask_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained_each.middle / self.tokens_each.middle if self.tokens_each.middle else 0.0


def look(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Look:
    """Read the source and render a random sample of it (of a hub's data set, its first rows).

    Raises:
        DataError: what the data stage itself would say about the source or the chat template.
    """
    source = config.source
    if isinstance(source, SelfWrittenSource):
        count = min(source.conversations, config.max_conversations or source.conversations)
        return _unwritten(count, config, tokenizer)
    items: int | None
    if isinstance(source, HubSource):
        few = min(SAMPLE, config.max_conversations or SAMPLE)
        streamed = config.model_copy(
            update={"source": source.model_copy(update={"streaming": True}), "max_conversations": few}
        )
        chosen = read_conversations(streamed).items
        # Where the card says nothing, the set is taken to hold what is asked for.
        rows = hub_rows_count(source) if len(chosen) == SAMPLE else len(chosen)
        items = (
            rows
            if config.max_conversations is None
            else min(rows or config.max_conversations, config.max_conversations)
        )
    else:
        found = read_conversations(config).items
        items = len(found)
        chosen = random.Random(seed).sample(found, min(SAMPLE, len(found)))
    prompt = config.system_prompt
    chosen = [
        with_system_prompt(shortened(item, config.max_turns), prompt) if isinstance(item, Conversation) else item
        for item in chosen
    ]
    text_bytes = sum(len(json.dumps(item_to_json(item), ensure_ascii=False).encode()) for item in chosen) / len(chosen)
    if isinstance(config.answers, KeepAnswers):
        rendered = [samples_of(item, tokenizer, config.turns) for item in chosen]
        cut = [
            TokenSample(s.id, s.input_ids[: config.max_length], s.loss_mask[: config.max_length])
            for own in rendered
            for s in own
        ]
        return Look(items, [[sketch_of(s) for s in own] for own in rendered], cut, [], 0.0, text_bytes)
    asked = [_asked(item, tokenizer, config) for item in chosen]
    prompts = [own[0].input_ids[: sketch_of(own[0]).contexts[0]] for own in asked if own]
    if not prompts:
        raise DataError("No conversation of the sample has an answer that the target could write; look at the source.")
    turns = sum(_answers_of(item) for item in chosen) / len(chosen)
    return Look(items, [[sketch_of(s) for s in own] for own in asked], [], prompts, turns, text_bytes)


def hub_rows_count(source: HubSource) -> int | None:
    """Rows of the split as its card says; None where it does not, or cannot be reached."""
    import datasets  # takes seconds

    known, full = resolve(source)
    try:
        builder = datasets.load_dataset_builder(full.name, full.subset, data_files=known.file, revision=full.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return None
    splits = builder.info.splits or {}
    return splits[full.split].num_examples or None if full.split in splits else None


def sketch_of(sample: TokenSample) -> Sketch:
    """The lengths of its runs; what stands behind the last trained token is left out.

    >>> sketch_of(TokenSample("", [1, 2, 3, 4, 5], [False, False, True, False, True]))
    Sketch(contexts=(2, 1), answers=(1, 1))
    """
    contexts, answers = [], []
    context = 0
    for trained, run in groupby(sample.loss_mask):
        length = len(list(run))
        if trained:
            contexts.append(context)
            answers.append(length)
        context = 0 if trained else length
    return Sketch(tuple(contexts), tuple(answers))


def volume(seen: Look, config: DataConfig, answer: Interval | None = None, request: Interval | None = None) -> Volume:
    """Sum up, with the lengths of what the target writes where they were measured.

    Args:
        seen: The sample.
        config: The `data` section.
        answer: Mean tokens of an answer; None bounds it by `max_new_tokens`.
        request: Mean tokens of a self-written request; None bounds it by `max_prompt_tokens`.
    """
    written = prompts = None
    sketches = seen.sketches

    def mean(values: Sequence[float]) -> Interval:
        # What the template adds to a self-written request is known from one.
        return Interval.exact(values[0]) if request is not None else mean_of(values, seen.items)

    if isinstance(config.source, SelfWrittenSource):
        request = request or Interval(1, config.source.max_prompt_tokens)
    if isinstance(config.answers, RegenerateAnswers):
        answer = answer or Interval(1, config.answers.max_new_tokens)
        ends = [(answer.low, request.low if request else 0.0), (answer.high, request.high if request else 0.0)]
        bounds = [_lengths([_longer(own, extra) for own in sketches], config.max_length, one) for one, extra in ends]
        if seen.items is not None:
            # `last` trains one answer and has all written.
            written = answer.times(seen.turns * seen.items)
            prompts = mean([sum(s.contexts[0] for s in own) for own in sketches]).times(seen.items)
            if request is not None:
                written = written + request.times(seen.items)
                prompts = prompts + request.times(seen.items)
    else:
        answer = None
        bounds = [_lengths(sketches, config.max_length, None)] * 2
    (fewest, fewest_trained), (most, most_trained) = bounds
    exact_lengths = [s.lengths(10**9) for own in sketches for s in own] if answer is None else []
    return Volume(
        conversations=seen.items,
        sampled=len(sketches),
        tokens_each=Interval(mean(fewest).low, mean(most).high),
        trained_each=Interval(mean(fewest_trained).low, mean(most_trained).high),
        answer=answer,
        request=request,
        written=written,
        prompts=prompts,
        longest=math.ceil(max(most)),
        cut_share=sum(length > config.max_length for length, _ in exact_lengths) / max(1, len(exact_lengths)),
        distinct_trained=distinct(seen.samples, seen.items, len(sketches)),
        text_bytes_each=seen.text_bytes,
    )


def volume_of(samples: Sequence[TokenSample], text_bytes: float) -> Volume:
    """Of a finished data stage: nothing is estimated."""
    count = len(samples)
    trained = [token for s in samples for token, flag in zip(s.input_ids, s.loss_mask, strict=True) if flag]
    return Volume(
        conversations=count,
        sampled=count,
        tokens_each=Interval.exact(sum(len(s.input_ids) for s in samples) / count),
        trained_each=Interval.exact(len(trained) / count),
        answer=None,
        request=None,
        written=None,
        prompts=None,
        longest=max(len(s.input_ids) for s in samples),
        cut_share=0.0,
        distinct_trained=float(len(set(trained))),
        text_bytes_each=text_bytes / count,
        exact=True,
    )


def distinct(samples: Sequence[TokenSample], items: int | None, sampled: int) -> float | None:
    """Different trained tokens of the whole set, by Heaps' law D = K * N^b through the sample's half and whole.

    (H. S. Heaps, Information Retrieval, 1978.) None for answers that are not there yet, or of unknown number.
    """
    runs = [[t for t, flag in zip(s.input_ids, s.loss_mask, strict=True) if flag] for s in samples]
    half = [token for run in runs[::2] for token in run]
    whole = [token for run in runs for token in run]
    if items is None or not half:
        return None
    seen = len(set(whole))
    if items <= sampled or len(whole) == len(half):
        return float(seen)
    exponent = math.log(seen / len(set(half))) / math.log(len(whole) / len(half))
    return float(seen * (items / sampled) ** exponent)


def _lengths(
    sketches: Sequence[Sequence[Sketch]], max_length: int, answer: float | None
) -> tuple[list[float], list[float]]:
    """Tokens and trained tokens of each conversation."""
    both = [[sketch.lengths(max_length, answer) for sketch in own] for own in sketches]
    return [sum(t for t, _ in own) for own in both], [sum(t for _, t in own) for own in both]


def _longer(own: Sequence[Sketch], by: float) -> list[Sketch]:
    """With a self-written request in the first context."""
    return [replace(s, contexts=(s.contexts[0] + round(by), *s.contexts[1:])) for s in own]


def _asked(item: Item, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[TokenSample]:
    """Rendered with answers of one token in place of those that the target will write; tool calls stay context."""
    if not isinstance(item, Conversation):
        raise DataError(f"{item.id} holds no turns, so its answers cannot be written again; use answers.kind=keep.")
    if item.messages[-1].role != "assistant":
        item = replace(item, messages=(*item.messages, Message("assistant", "OK")))
    end = tokenizer.eos_token_id
    stand_in = Answer((end if isinstance(end, int) else 0,), finished=True)
    answers = [None if m.tool_calls else stand_in for m in item.messages if m.role == "assistant"]
    return [s for s in samples_of(item, tokenizer, config.turns, answers) if any(s.loss_mask)]


def _answers_of(item: Item) -> int:
    assert isinstance(item, Conversation)
    written = sum(m.role == "assistant" and not m.tool_calls for m in item.messages)
    return written + (item.messages[-1].role != "assistant")


def _unwritten(count: int, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Look:
    """A source that does not exist yet: what the template adds to a request is all that is known."""
    conversation = Conversation("", (Message("user", ""), Message("assistant", "OK")), "")
    overhead = sketch_of(render(tokenizer, conversation, None, config.system_prompt)).contexts[0]
    prefix = user_turn_prefix(tokenizer, config.system_prompt)
    return Look(count, [[Sketch((overhead,), (0,))]], [], [prefix], 1.0, 0.0)
