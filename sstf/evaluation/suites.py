"""Prompt suites: the built-in one (64 prompts, 8 categories, some in Chinese) or any local JSONL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sstf.errors import DataError
from sstf.types import Message


@dataclass(frozen=True)
class Prompt:
    """One request. `category` groups results."""

    id: str
    category: str
    messages: tuple[Message, ...]


def load_suite(name: str, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a suite.

    A row of a JSONL suite has `prompt` (text) or `messages` (role and content), and may have `id` and `category`.

    Raises:
        DataError: a row is broken, or there is none.
    """
    if name == "builtin":
        text = resources.files("sstf.evaluation").joinpath("suites/builtin.jsonl").read_text(encoding="utf-8")
    else:
        text = Path(name).read_text(encoding="utf-8")
    prompts = [_row(name, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not prompts:
        raise DataError(f"suite {name} holds no prompt")
    return prompts[:limit]


def _row(name: str, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
        turns = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{name}:{number}: expected a JSON object with `prompt` or `messages`, found {line[:60]!r}"
        ) from None
    if not messages or messages[-1].role != "user" or not all(isinstance(m.content, str) for m in messages):
        raise DataError(f"{name}:{number}: the last message must be a user's text")
    return Prompt(str(row.get("id", f"{number}")), str(row.get("category", "all")), messages)
