"""The target answers the conversations itself.

A draft head learns to predict its target. Answers written by another model are text that the target would not have
written, and accuracy on them does not survive serving; so regeneration is the default.

Turn by turn: the second request is asked after the new first answer. Groups of conversations are finished, written and
never touched again, so a run that was killed goes on with the first missing group and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer, AnsweredConversation, answered_from_json, answered_to_json, conversation_to_json
from sstf.data.chat_template import TurnRenderer
from sstf.data.config import RegenerateAnswers
from sstf.data.groups import GroupFiles
from sstf.data.progress import Progress
from sstf.data.sampler import Sampler, derive_seed
from sstf.types import Conversation, Message, Sampled, SamplingParams


def regenerate(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    config: RegenerateAnswers,
    files: GroupFiles,
    progress: Progress,
    max_length: int,
) -> list[AnsweredConversation]:
    """Replace every assistant turn by the target's own; a request that ends a conversation is answered too.

    Args:
        conversations: The answers in them are ignored.
        tokenizer: With a chat template.
        sampler: The target.
        config: Temperatures, limits and group size.
        files: Where finished groups are kept.
        progress: Shows conversations and tokens.
        max_length: In tokens. A conversation ends where the next request would leave no room for an answer; a first
            request that leaves none gives a conversation without answers.

    Returns:
        One result a conversation, in the same order.

    Raises:
        DataError: The template changes earlier turns, or the groups on disk belong to another run.
        DamagedDataError: A group on disk was altered.
    """
    # `slots` changes speed, not results, so that it can be tuned between resumes.
    settings = {**config.model_dump(mode="json", exclude={"slots"}), "max_length": max_length}
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
                dialogues = [_Dialogue.begin(first + i, c, tokenizer) for i, c in enumerate(members)]
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
    """A conversation in the making."""

    index: int  # in the whole data set: seeds and temperatures depend on it, not on the group
    source: Conversation
    tokenizer: PreTrainedTokenizerBase
    renderer: TurnRenderer
    requests: Iterator[Message]
    messages: list[Message]
    answers: list[Answer] = field(default_factory=list)
    cut: bool = False

    @staticmethod
    def begin(index: int, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> _Dialogue:
        return _Dialogue(
            index=index,
            source=conversation,
            tokenizer=tokenizer,
            renderer=TurnRenderer(tokenizer, conversation.id),
            requests=iter([m for m in conversation.messages if m.role == "user"]),
            messages=[m for m in conversation.messages if m.role == "system"],
        )

    def next_prompt(self, max_length: int) -> list[int] | None:
        """Ids that end where the assistant writes; None when the conversation is over."""
        request = next(self.requests, None)
        if request is None or self.cut:
            return None
        prompt = self.renderer.ask([*self.messages, request])
        if len(prompt) >= max_length:
            self.cut = True
            return None
        self.messages.append(request)
        return prompt

    def take(self, sampled: Sampled, no_room_left: bool) -> None:
        answer = Answer(tuple(sampled.token_ids), sampled.finished)
        self.renderer.take(answer)
        self.answers.append(answer)
        self.messages.append(Message("assistant", answer_text(self.tokenizer, sampled)))
        self.cut = no_room_left and not sampled.finished

    def result(self) -> AnsweredConversation:
        conversation = Conversation(self.source.id, tuple(self.messages), self.source.source)
        return AnsweredConversation(conversation, tuple(self.answers), self.cut)


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
