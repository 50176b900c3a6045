"""One row of any supported form -> `Conversation`; anything else is refused with its reason.

Two forms: `{"messages": [{"role", "content"}, ...]}` and ShareGPT's `{"conversations": [{"from", "value"}, ...]}`.
What cannot be represented (images, tool calls, reasoning in a field of its own) is refused aloud: dropping it in
silence would train on half a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sstf.types import Conversation, Message

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
ROLES = {role: role for role in ("system", "user", "assistant")}
UNSUPPORTED_ROW_FIELDS = ("image", "images", "audio", "audios", "video", "videos", "tools", "functions")
UNSUPPORTED_MESSAGE_FIELDS = (*UNSUPPORTED_ROW_FIELDS, "tool_calls", "function_call", "reasoning_content")


@dataclass(frozen=True)
class _Form:
    """How one row form names things."""

    key: str
    role_key: str
    text_key: str
    roles: dict[str, str]


FORMS = (
    _Form("messages", "role", "content", ROLES),
    _Form("conversations", "from", "value", SHAREGPT_ROLES),
)


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of few, for counting; `detail` says what was found and expected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def parse_row(row: Any, fallback_id: str, source: str, needs_answers: bool) -> Conversation:
    """Normalise a row.

    Args:
        row: The decoded JSON value, or a row of a data set.
        fallback_id: Used where the row has no `id`.
        source: Recorded in the conversation.
        needs_answers: Whether a conversation without an assistant turn is useless.

    Returns:
        An optional system message, then user and assistant by turns.

    Raises:
        BadRow: Anything else.
    """
    if not isinstance(row, dict):
        raise BadRow("unknown form", f"found {_kind(row)}, expected an object")
    form = next((form for form in FORMS if row.get(form.key) is not None), None)
    if form is None:
        keys = ", ".join(map(str, row)) or "no keys"
        raise BadRow("unknown form", f"found {keys}, expected a key `messages` or `conversations`")
    _refuse_fields(row, UNSUPPORTED_ROW_FIELDS, "the row")
    turns = row[form.key]
    if not isinstance(turns, list):
        raise BadRow("unknown form", f"`{form.key}` is {_kind(turns)}, expected a list of turns")
    messages = tuple(_message(turn, number, form) for number, turn in enumerate(turns, start=1))
    _check_order(messages, needs_answers)
    name = row.get("id")
    return Conversation(fallback_id if name is None or name == "" else str(name), messages, source)


def _message(turn: Any, number: int, form: _Form) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("unknown form", f"turn {number} is {_kind(turn)}, expected an object")
    _refuse_fields(turn, UNSUPPORTED_MESSAGE_FIELDS, f"turn {number}")
    role = turn.get(form.role_key)
    if not isinstance(role, str) or role not in form.roles:
        raise BadRow(
            "unknown role", f"turn {number} has `{form.role_key}` {role!r}, expected one of {', '.join(form.roles)}"
        )
    text = _text(turn.get(form.text_key), number, form.text_key)
    if not text.strip():
        raise BadRow("empty content", f"turn {number} ({role}) has no text in `{form.text_key}`")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("broken text", f"turn {number} holds half a surrogate pair, expected valid Unicode") from None
    return Message(form.roles[role], text)


def _text(content: Any, number: int, key: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise BadRow("non-text content", f"turn {number} has {_kind(content)} in `{key}`, expected text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                "non-text content",
                f"turn {number} has a part of type {kind or _kind(part)!r} in `{key}`; only text is supported so far",
            )
        parts.append(part["text"])
    return "".join(parts)


def _refuse_fields(found: dict[str, Any], refused: tuple[str, ...], where: str) -> None:
    for name in refused:
        if found.get(name):
            raise BadRow(
                "unsupported field", f"{where} has `{name}`, which would be lost; only text is supported so far"
            )


def _check_order(messages: tuple[Message, ...], needs_answers: bool) -> None:
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken[:1] == ["assistant"]:
        raise BadRow("assistant first", "the first turn is the assistant's, expected a user turn before it")
    if "user" not in spoken:
        raise BadRow("no user turn", f"found {', '.join(roles) or 'no turns'}, expected at least one user turn")
    for number, role in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            at = number + 1 + len(roles) - len(spoken)
            raise BadRow("roles out of turn", f"turn {at} is {role}, expected {expected}")
    if needs_answers and "assistant" not in spoken:
        raise BadRow(
            "no assistant turn",
            "there is no answer to keep; expected one, or answers.kind=regenerate to have it written",
        )


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
