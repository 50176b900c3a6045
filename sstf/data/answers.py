"""Generated answers keep the target's own token ids.

Decoding an answer and tokenising it again may give other ids (a word that was sampled in two pieces merges into one).
The other ids are a sequence that the target did not write, so that a head trained on them sees states that never occur
in serving. A generated answer is therefore a pair: its text in `Conversation`, for people and for the template, and its
`Answer`, which `chat_template.render` puts between the template's ids as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sstf.data.rows import Item, PlainText, Pretokenised
from sstf.data.tool_calls import call_to_json
from sstf.types import Conversation, Message, ToolCall


@dataclass(frozen=True)
class Answer:
    """Ids of one generated answer. The last one is the end token if `finished`, else the answer was cut."""

    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class AnsweredConversation:
    """A conversation, and the ids of its assistant turns in order.

    `answers` is None when the answers are text only, as read from a data set, and all of them are to be trained. Where
    it is given, a None in it stands for a turn that was not generated (a tool call from the data): context, never
    trained. `cut` says that the length limit of the data ended the conversation early.
    """

    conversation: Conversation
    answers: tuple[Answer | None, ...] | None
    cut: bool = False


def item_to_json(item: Item) -> dict[str, Any]:
    """A row of any form, which `conversations.read_conversations` reads back."""
    match item:
        case Conversation():
            return conversation_to_json(item)
        case PlainText():
            return {"id": item.id, "source": item.source, "text": item.text}
        case Pretokenised():
            return {"id": item.id, "source": item.source, "input_ids": item.input_ids, "loss_mask": item.loss_mask}


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """The `messages` form, which `conversations.read_conversations` reads back."""
    row: dict[str, Any] = {
        "id": conversation.id,
        "source": conversation.source,
        "messages": [_message_to_json(message) for message in conversation.messages],
    }
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if conversation.mode is not None:
        row["mode"] = conversation.mode
    return row


def conversation_from_json(row: dict[str, Any]) -> Conversation:
    """The exact inverse of `conversation_to_json`, where reading a data set would also tidy the row."""
    messages = tuple(_message_from_json(message) for message in row["messages"])
    return Conversation(row["id"], messages, row["source"], tuple(row.get("tools", ())), row.get("mode"))


def answered_to_json(item: AnsweredConversation) -> dict[str, Any]:
    """A row of a group file: the texts, and the ids of the answers."""
    assert item.answers is not None
    answers = [
        None if answer is None else {"token_ids": list(answer.token_ids), "finished": answer.finished}
        for answer in item.answers
    ]
    return {**conversation_to_json(item.conversation), "answers": answers, "cut": item.cut}


def answered_from_json(row: dict[str, Any]) -> AnsweredConversation:
    """The inverse of `answered_to_json`."""
    answers = tuple(a if a is None else Answer(tuple(a["token_ids"]), a["finished"]) for a in row["answers"])
    return AnsweredConversation(conversation_from_json(row), answers, row["cut"])


def _message_to_json(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [call_to_json(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    return row


def _message_from_json(row: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id"))
        for call in row.get("tool_calls", ())
    )
    return Message(
        row["role"], row["content"], row.get("reasoning_content"), calls, row.get("tool_call_id"), row.get("name")
    )
