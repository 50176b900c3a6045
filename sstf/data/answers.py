"""Generated answers keep the target's own token ids.

Decoding an answer and tokenising it again may give other ids (a word that was sampled in two pieces merges into one).
The other ids are a sequence that the target did not write, so that a head trained on them sees states that never occur
in serving. A generated answer is therefore a pair: its text in `Conversation`, for people and for the template, and its
`Answer`, which `chat_template.render` puts between the template's ids as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sstf.types import Conversation, Message


@dataclass(frozen=True)
class Answer:
    """Ids of one generated answer. The last one is the end token if `finished`, else the answer was cut."""

    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class AnsweredConversation:
    """A conversation, and the ids of its assistant turns in order.

    `answers` is None when the answers are text only, as read from a data set. `cut` says that the length limit of the
    data ended the conversation early.
    """

    conversation: Conversation
    answers: tuple[Answer, ...] | None
    cut: bool = False


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """The `messages` form, which `conversations.read_conversations` reads back."""
    return {
        "id": conversation.id,
        "source": conversation.source,
        "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
    }


def answered_to_json(item: AnsweredConversation) -> dict[str, Any]:
    """A row of a group file: the texts, and the ids of the answers."""
    assert item.answers is not None
    answers = [{"token_ids": list(answer.token_ids), "finished": answer.finished} for answer in item.answers]
    return {**conversation_to_json(item.conversation), "answers": answers, "cut": item.cut}


def answered_from_json(row: dict[str, Any]) -> AnsweredConversation:
    """The inverse of `answered_to_json`."""
    messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
    answers = tuple(Answer(tuple(a["token_ids"]), a["finished"]) for a in row["answers"])
    return AnsweredConversation(Conversation(row["id"], messages, row["source"]), answers, row["cut"])
