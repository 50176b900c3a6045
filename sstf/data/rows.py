"""One row of any supported form -> what is trained on; anything else is refused with its reason.

| form | keys | becomes |
|---|---|---|
| OpenAI | `messages` (or `conversations`) of `role`, `content`, `tool_calls`, ...; `tools` | a conversation |
| ShareGPT | `conversations` of `from`, `value`; `system`, `tools` | a conversation |
| Alpaca | `instruction`, `input`, `output`; `system`, `history` | a conversation |
| pairs | `question`/`answer`, `prompt`/`response`, `prompt`/`completion`, `instruction`/`response` | a conversation |
| plain text | `text` | continuation training, without a template |
| pre-tokenised | `input_ids` and `loss_mask`, or `labels` with -100 | the tokens as they are |

A row may say its `mode` (`thinking` or `plain`); without one, an assistant turn with reasoning makes it `thinking`.
Reasoning comes in a field of its own or as `<think>...</think>` at the beginning of an answer. What cannot be
represented (images, say) is refused aloud: dropping it in silence would train on half a conversation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sstf.data.tool_calls import call_to_json, parse_calls, parse_tools, split_tagged_calls, split_tagged_results
from sstf.types import Conversation, Message, Mode, ToolCall

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
TURN_KEYS = ("messages", "conversations", "conversation")
REQUEST_KEYS = ("instruction", "question", "prompt")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
SYSTEM_KEYS = ("system", "system_prompt")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
IGNORED_LABEL = -100
LEADING_ANSWERS = "assistant turns before the first request left out"


@dataclass(frozen=True)
class PlainText:
    """Text without turns; every token after the first is trained."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class Pretokenised:
    """Token ids that someone else rendered; `loss_mask[t]` is True where token t is trained."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]
    source: str


Item = Conversation | PlainText | Pretokenised


@dataclass(frozen=True)
class ParsedRow:
    """`repaired` says what had to be left out to make the row usable."""

    item: Item
    repaired: str | None = None


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of few, for counting; `detail` says what was found and expected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class UselessRow(BadRow):
    """A sound row that holds nothing for this run: counted, and never a reason to stop."""


def parse_row(row: Any, fallback_id: str, source: str, regenerate: bool) -> ParsedRow:
    """Normalise a row.

    Args:
        row: The decoded JSON value, or a row of a data set.
        fallback_id: Used where the row has no `id`.
        source: Recorded in the result.
        regenerate: Whether the target will write the answers; without it a row needs an answer of its own.

    Returns:
        A conversation is an optional system message, then user and assistant by turns, where each assistant turn may be
        calls, their results, and another assistant turn.

    Raises:
        BadRow: Anything else.
    """
    if not isinstance(row, dict):
        raise BadRow("unknown form", f"found {_kind(row)}, expected an object")
    _refuse_media(row, "the row")
    given = row.get("id")
    name = fallback_id if given is None or given == "" else str(given)
    key = next((key for key in TURN_KEYS if row.get(key) is not None), None)
    if row.get("input_ids") is not None:
        _refuse_regeneration(regenerate, "pre-tokenised rows")
        return ParsedRow(_pretokenised(row, name, source))
    if key is not None:
        return _conversation(row, row[key], key, name, source, regenerate)
    if any(row.get(key) is not None for key in REQUEST_KEYS):
        return _conversation(row, _pair(row), "turns", name, source, regenerate)
    if row.get("text") is not None:
        _refuse_regeneration(regenerate, "plain text")
        text = _text(row["text"], "the row", "text")
        if not text.strip():
            raise BadRow("empty content", "the row has no text in `text`")
        _check_unicode(text, "the row")
        return ParsedRow(PlainText(name, text, source))
    keys = ", ".join(map(str, row)) or "no keys"
    raise BadRow(
        "unknown form",
        f"found {keys}, expected a key `messages` or `conversations`, a pair such as `instruction` and `output` or "
        "`question` and `answer`, `text`, or `input_ids`",
    )


def _pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of an Alpaca row or of a request and its answer."""
    answered = next((pair for pair in PAIRS if all(row.get(key) is not None for key in pair)), None)
    request_key = answered[0] if answered else next(key for key in REQUEST_KEYS if row.get(key) is not None)
    turns: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("unknown form", "`history` is not a list of [request, answer] pairs")
    for request, answer in history:
        turns += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    request = _text(row[request_key], "the row", request_key)
    more = _text(row.get("input"), "the row", "input") if request_key == "instruction" else ""
    turns.append({"role": "user", "content": f"{request}\n{more}" if more.strip() else request})
    if answered:
        turns.append({"role": "assistant", "content": row[answered[1]]})
    return turns


def _conversation(row: dict[str, Any], turns: Any, key: str, name: str, source: str, regenerate: bool) -> ParsedRow:
    if not isinstance(turns, list):
        raise BadRow("unknown form", f"`{key}` is {_kind(turns)}, expected a list of turns")
    sharegpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0] and "role" not in turns[0]
    messages = [
        message for number, turn in enumerate(turns, start=1) for message in _messages(turn, f"turn {number}", sharegpt)
    ]
    system = next((row[key] for key in SYSTEM_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if system is not None and (not messages or messages[0].role != "system"):
        _check_unicode(system, "the system prompt")
        messages.insert(0, Message("system", system))
    repaired = None
    if sharegpt and (kept := _without_leading_answers(messages)) != messages:
        messages, repaired = kept, LEADING_ANSWERS
    _check_order(messages)
    spoken = [message for message in messages if message.role != "system"]
    if not regenerate and all(message.role != "assistant" for message in spoken):
        raise BadRow(
            "no assistant turn",
            "there is no answer to keep; expected one, or answers.kind=regenerate to have it written",
        )
    written = any(message.role == "assistant" and not message.tool_calls for message in spoken)
    if regenerate and not written and spoken[-1].role == "assistant":
        raise UselessRow("nothing to regenerate", "all assistant turns are tool calls, which cannot be executed again")
    tools = _tools(row)
    if tools and messages[0].role == "system" and "<tools>" in messages[0].content:
        tools = ()  # Hermes' rows spell the schemas out in their system prompts; they would be there twice.
    mode = _mode(row, spoken)
    return ParsedRow(Conversation(name, tuple(messages), source, tools, mode), repaired)


def _messages(turn: Any, where: str, sharegpt: bool) -> list[Message]:
    """The messages of one turn: one, or as many results as a ShareGPT tool turn holds."""
    if not isinstance(turn, dict):
        raise BadRow("unknown form", f"{where} is {_kind(turn)}, expected an object")
    _refuse_media(turn, where)
    role_key, text_key, roles = ("from", "value", SHAREGPT_ROLES) if sharegpt else ("role", "content", OPENAI_ROLES)
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise BadRow("unknown role", f"{where} has `{role_key}` {role!r}, expected one of {', '.join(roles)}")
    text = _text(turn.get(text_key), where, text_key)
    _check_unicode(text, where)
    kind = roles[role]
    if kind == "assistant":
        message = _answer(turn, text, where, sharegpt, is_call=role == "function_call")
    elif kind == "tool":
        call_id, function = turn.get("tool_call_id"), turn.get("name")
        results = split_tagged_results(text) if sharegpt else [text]
        return [Message("tool", result, tool_call_id=call_id or None, name=function or None) for result in results]
    else:
        message = Message(kind, text)
    if not message.content.strip() and not message.tool_calls:
        raise BadRow("empty content", f"{where} ({role}) has no text in `{text_key}`")
    return [message]


def _answer(turn: dict[str, Any], text: str, where: str, sharegpt: bool, is_call: bool) -> Message:
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRow("non-text content", f"{where} has {_kind(reasoning)} as reasoning, expected text")
    opened = text.lstrip().removeprefix("<think>")
    if reasoning is None and opened != text.lstrip() and "</think>" in opened:
        thought, _, text = opened.partition("</think>")
        reasoning, text = thought.strip() or None, text.lstrip("\n")
    elif reasoning is not None:
        _check_unicode(reasoning, where)
    calls: tuple[ToolCall, ...] = ()
    try:
        if is_call:
            text, calls = "", parse_calls(text)
        elif turn.get("tool_calls"):
            calls = parse_calls(turn["tool_calls"])
        elif turn.get("function_call"):
            calls = parse_calls(turn["function_call"])
        elif sharegpt:
            text, calls = split_tagged_calls(text)
    except ValueError as error:
        raise BadRow("broken tool call", f"{where}: {error}") from None
    for call in calls:
        _check_unicode(json.dumps(call_to_json(call), ensure_ascii=False), where)
    return Message("assistant", text, reasoning=reasoning, tool_calls=calls)


def _without_leading_answers(messages: list[Message]) -> list[Message]:
    """ShareGPT's dumps were split by length, so that many rows begin with the answer to a request in another row."""
    first = 1 if messages and messages[0].role == "system" else 0
    if first == len(messages) or messages[first].role != "assistant":
        return messages
    start = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    return messages[:first] + messages[start:]


def _check_order(messages: list[Message]) -> None:
    roles = [message.role for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if roles[first : first + 1] == ["assistant"]:
        raise BadRow("assistant first", "the first turn is the assistant's, expected a user turn before it")
    if "user" not in roles:
        raise BadRow("no user turn", f"found {', '.join(roles) or 'no turns'}, expected at least one user turn")
    expected: tuple[str, ...] = ("user",)
    for number, message in enumerate(messages[first:], start=first + 1):
        if message.role not in expected:
            wanted = " or ".join(expected)
            raise BadRow("roles out of turn", f"turn {number} is {message.role}, expected {wanted}")
        if message.role == "user":
            expected = ("assistant",)
        elif message.role == "tool":
            expected = ("tool", "assistant")
        else:
            expected = ("tool",) if message.tool_calls else ("user",)


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    try:
        tools = parse_tools(row.get("tools") or row.get("functions") or [])
    except ValueError as error:
        raise BadRow("broken tools", f"the row's tools: {error}") from None
    for tool in tools:
        _check_unicode(json.dumps(tool, ensure_ascii=False), "the row's tools")
    return tools


def _mode(row: dict[str, Any], spoken: list[Message]) -> Mode | None:
    given = row.get("mode")
    if given not in (None, "thinking", "plain"):
        raise BadRow("unknown mode", f"`mode` is {given!r}, expected `thinking` or `plain`")
    thinks = any(message.reasoning is not None for message in spoken)
    if given == "plain" and thinks:
        raise BadRow("reasoning in plain mode", "`mode` is `plain`, and an answer carries reasoning")
    return given or ("thinking" if thinks else None)


def _pretokenised(row: dict[str, Any], name: str, source: str) -> Pretokenised:
    ids, mask, labels = row["input_ids"], row.get("loss_mask"), row.get("labels")
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise BadRow("bad token ids", "`input_ids` is not a list of whole numbers from 0 on")
    given = mask if mask is not None else labels
    key = "loss_mask" if mask is not None else "labels"
    if given is None:
        raise BadRow("bad token ids", "there are `input_ids`, expected a `loss_mask` or `labels` beside them")
    if not isinstance(given, list) or len(given) != len(ids):
        found = f"{len(given)} entries" if isinstance(given, list) else _kind(given)
        raise BadRow("bad token ids", f"`{key}` has {found}, expected one for each of the {len(ids)} `input_ids`")
    if mask is not None:
        if any(flag not in (0, 1) for flag in mask):
            raise BadRow("bad token ids", "`loss_mask` holds something else than 0, 1, true and false")
        return Pretokenised(name, ids, [bool(flag) for flag in mask], source)
    wrong = next((t for t, label in enumerate(given) if label not in (IGNORED_LABEL, ids[t])), None)
    if wrong is not None:
        raise BadRow(
            "bad token ids",
            f"`labels` has {given[wrong]!r} at {wrong}, expected {IGNORED_LABEL} or the input id {ids[wrong]}: labels "
            "must not be shifted",
        )
    return Pretokenised(name, ids, [label != IGNORED_LABEL for label in given], source)


def _text(content: Any, where: str, key: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise BadRow("non-text content", f"{where} has {_kind(content)} in `{key}`, expected text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                "non-text content",
                f"{where} has a part of type {kind or _kind(part)!r} in `{key}`; targets here read text only",
            )
        parts.append(part["text"])
    return "".join(parts)


def _refuse_media(found: dict[str, Any], where: str) -> None:
    for name in MEDIA_KEYS:
        if found.get(name):
            raise BadRow("non-text content", f"{where} has `{name}`; targets here read text only")


def _refuse_regeneration(regenerate: bool, what: str) -> None:
    if regenerate:
        raise BadRow(
            "cannot be regenerated",
            f"there is no request in {what} that the target could answer; expected conversations, or answers.kind=keep",
        )


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("broken text", f"{where} holds half a surrogate pair, expected valid Unicode") from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
