"""The target answers the conversations itself.

A draft head learns to predict its target. Answers written by another model are text that the target would not have
written, and accuracy on them does not survive serving; so regeneration is the default.

Turn by turn: the second request is asked after the new first answer. Tool calls of the data cannot be executed again,
so they and their results stay as they are, context that is not trained, and the answers around them are written anew.
A tool call that the target writes in such an answer is part of its text; nobody executes it.

With `turns: every` a conversation grows as one sequence of ids, as with a prefix cache. With `each` and `last` every
turn is asked with the history as the template renders it, which may drop earlier reasoning; all turns are written in
both, so that the history is the target's own, though `last` trains only the last one.

Groups of conversations are finished, written and never touched again, so a run that was killed goes on with the first
missing group and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer, AnsweredConversation, answered_from_json, answered_to_json, conversation_to_json
from sstf.data.chat_template import TurnRenderer
from sstf.data.config import RegenerateAnswers, Turns
from sstf.data.groups import GroupFiles
from sstf.data.progress import Progress
from sstf.data.sampler import Sampler, derive_seed
from sstf.data.template import chat_template
from sstf.types import Conversation, Message, Sampled, SamplingParams


def regenerate(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    config: RegenerateAnswers,
    files: GroupFiles,
    progress: Progress,
    max_length: int,
    turns: Turns = "every",
) -> list[AnsweredConversation]:
    """Replace every assistant turn without tool calls by the target's own; a request at the end is answered too.

    Args:
        conversations: The answers in them are ignored, their tool calls and results are kept.
        tokenizer: With a chat template.
        sampler: The target.
        config: Temperatures, limits and group size.
        files: Where finished groups are kept.
        progress: Shows conversations and tokens.
        max_length: In tokens. A conversation ends where the next request would leave no room for an answer; a first
            request that leaves none gives a conversation without answers.
        turns: Whether a later turn is asked after the ids so far (`every`), or after the history as the template
            renders it (`each`, `last`).

    Returns:
        One result a conversation, in the same order.

    Raises:
        DataError: The template changes earlier turns, or the groups on disk belong to another run.
        DamagedDataError: A group on disk was altered.
    """
    grows = turns == "every"
    # `slots` changes speed, not results, so that it can be tuned between resumes; and a server may move.
    own = config.model_dump(mode="json", exclude={"slots", "engine"})
    settings = {**own, "engine": config.engine.kind, "max_length": max_length, "grows": grows}
    answered: list[AnsweredConversation] = []
    with (
        progress.start("answers by the target", len(conversations), "conversations") as done,
        progress.start("answer tokens", None, "tokens") as tokens,
    ):
        for group, first in enumerate(range(0, len(conversations), config.group_size)):
            members = conversations[first : first + config.group_size]
            depends_on = [settings, first, [conversation_to_json(c) for c in members]]
            rows = files.read(group, depends_on)
            if rows is None:
                dialogues = [_Dialogue(first + i, c, tokenizer, grows) for i, c in enumerate(members)]
                _converse(dialogues, sampler, config, max_length, tokens.advance)
                rows = [answered_to_json(dialogue.result()) for dialogue in dialogues]
                files.write(group, depends_on, rows)
            answered.extend(answered_from_json(row) for row in rows)
            done.advance(len(members))
    return answered


def answer_text(tokenizer: PreTrainedTokenizerBase, sampled: Sampled) -> str:
    """The text of a continuation without the end token; special tokens inside stay visible."""
    ids = sampled.token_ids[:-1] if sampled.finished else sampled.token_ids
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@dataclass
class _Dialogue:
    """A conversation in the making: `messages` and `answers` grow along `source`."""

    index: int  # in the whole data set: seeds and temperatures depend on it, not on the group
    source: Conversation
    tokenizer: PreTrainedTokenizerBase
    grows: bool  # one sequence of ids for all turns, in place of one a turn
    messages: list[Message] = field(default_factory=list)
    answers: list[Answer | None] = field(default_factory=list)
    cut: bool = False
    _read: int = 0  # messages of `source` that were used
    _renderer: TurnRenderer | None = None

    def next_prompt(self, max_length: int) -> list[int] | None:
        """Ids that end where the assistant writes; None when the conversation is over."""
        context = self._next_context()
        if self.cut or not context or context[-1].role not in ("user", "tool"):
            return None
        messages = [*self.messages, *context]
        if self._renderer is None or not self.grows:
            self._renderer = TurnRenderer(self.tokenizer, self.source.id, self.source.tools, self.source.mode)
        prompt = self._renderer.ask(messages)
        if len(prompt) >= max_length:
            self.cut = True
            return None
        self.messages = messages
        self.answers += [None for message in context if message.role == "assistant"]
        return prompt

    def take(self, sampled: Sampled, no_room_left: bool) -> None:
        assert self._renderer is not None
        answer = Answer(tuple(sampled.token_ids), sampled.finished)
        self._renderer.take(answer)
        self.answers.append(answer)
        text = answer_text(self.tokenizer, sampled)
        self.messages.append(chat_template(self.tokenizer).split_reasoning(text, self.source.mode))
        self.cut = no_room_left and not sampled.finished

    def result(self) -> AnsweredConversation:
        conversation = replace(self.source, messages=tuple(self.messages))
        return AnsweredConversation(conversation, tuple(self.answers), self.cut)

    def _next_context(self) -> list[Message]:
        """What stands before the next answer to write: requests, and tool calls with their results."""
        messages, start = self.source.messages, self._read
        while self._read < len(messages):
            message = messages[self._read]
            self._read += 1
            if message.role == "assistant" and not message.tool_calls:
                return list(messages[start : self._read - 1])
        return list(messages[start:])


def _converse(
    dialogues: Sequence[_Dialogue],
    sampler: Sampler,
    config: RegenerateAnswers,
    max_length: int,
    on_token: Callable[[int], None],
) -> None:
    turn = 0
    while True:
        asked = [(d, prompt) for d in dialogues if (prompt := d.next_prompt(max_length)) is not None]
        if not asked:
            return
        params = [
            SamplingParams(
                temperature=config.temperatures[dialogue.index % len(config.temperatures)],
                top_p=config.top_p,
                top_k=config.top_k,
                max_new_tokens=min(config.max_new_tokens, max_length - len(prompt)),
                seed=derive_seed("answer", config.seed, dialogue.index, turn),
            )
            for dialogue, prompt in asked
        ]
        results = sampler.sample([prompt for _, prompt in asked], params, config.slots, on_token)
        for (dialogue, prompt), sampled in zip(asked, results, strict=True):
            dialogue.take(sampled, no_room_left=len(prompt) + len(sampled.token_ids) >= max_length)
        turn += 1
