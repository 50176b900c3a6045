"""Tool calls and tool schemas in the forms that data sets hold them -> one structure, and back to OpenAI's form.

Calls come as OpenAI's `tool_calls`, its older `function_call`, the JSON value of a ShareGPT `function_call` turn, or
Hermes' `<tool_call>` tags inside a text. Schemas come as a list or as JSON text of one, with or without OpenAI's
`{"type": "function", "function": ...}` around each. Nothing is executed, here or anywhere.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from sstf.types import ToolCall

_CALL_TAGS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT_TAGS = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


def parse_calls(value: Any) -> tuple[ToolCall, ...]:
    """Calls from a list, a single object, or JSON text of either.

    Raises:
        ValueError: With a sentence that says what was found.
    """
    if isinstance(value, str):
        value = _decode(value, "a tool call")
    return tuple(_call(item) for item in (value if isinstance(value, list) else [value]))


def split_tagged_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Text that ends with `<tool_call>` blocks -> the text before them, and the calls; other text stays as it is.

    Raises:
        ValueError: A block does not hold a call.
    """
    start = text.find("<tool_call>")
    if start < 0 or _CALL_TAGS.sub("", text[start:]).strip():
        return text, ()
    calls = tuple(call for block in _CALL_TAGS.findall(text, start) for call in parse_calls(block))
    return text[:start].strip(), calls


def split_tagged_results(text: str) -> list[str]:
    """The contents of `<tool_response>` blocks, or the whole text if it is not made of them."""
    if not _RESULT_TAGS.search(text) or _RESULT_TAGS.sub("", text).strip():
        return [text]
    return [block.strip() for block in _RESULT_TAGS.findall(text)]


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Schemas in OpenAI's form.

    Raises:
        ValueError: With a sentence that says what was found.
    """
    if isinstance(value, str):
        value = _decode(value, "the tool schemas") if value.strip() else []
    if not isinstance(value, list):
        raise ValueError("the tool schemas are no list")
    return tuple(_tool(item) for item in value)


def call_to_json(call: ToolCall) -> dict[str, Any]:
    """OpenAI's form, with the arguments as an object, which is what chat templates expect."""
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call(item: Any) -> ToolCall:
    found = item.get("function", item) if isinstance(item, dict) else None
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(name, str) or not name:
        raise ValueError("a tool call has no function name")
    arguments = found.get("arguments")
    if arguments is None:
        arguments = found.get("parameters")
    if isinstance(arguments, str):
        arguments = _decode(arguments, f"the arguments of {name!r}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name!r} are no object")
    identity = item.get("id")
    return ToolCall(name, arguments, identity if isinstance(identity, str) and identity else None)


def _tool(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        item = _decode(item, "a tool schema")
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool schema has no function name")
    return item if function is not item else {"type": "function", "function": function}


def _decode(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Hermes' data holds Python literals. `literal_eval` reads values only, no expressions.
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{what} cannot be read as JSON ({error.msg} at column {error.colno})") from None
