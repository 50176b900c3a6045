"""Prompt suites: the built-in one (64 prompts, 8 categories, some in Chinese) or any local JSONL."""

from __future__ import annotations

import json
from collections import Counter
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

    A row of a JSONL suite has `prompt` (text) or `messages` (role and content), and may have `id` and `category`. A
    final answer is dropped, so that conversations can serve as a suite.

    Raises:
        DataError: the file cannot be read, a row is broken, two have the same id, or there is none.
    """
    if name == "builtin":
        text = resources.files("sstf.evaluation").joinpath("suites/builtin.jsonl").read_text(encoding="utf-8")
    else:
        text = _read(Path(name))
    # Not `splitlines`: JSON allows U+2028 and its like within a text.
    prompts = [_row(name, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise DataError(f"suite {name} holds no prompt; expected a JSON object with `prompt` or `messages` a line")
    repeated = [prompt_id for prompt_id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(f"suite {name}: {repeated[0]!r} is the id of several prompts; give each its own")
    return prompts[:limit]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"suite {path}: byte {error.start + 1} is not UTF-8; convert the file") from None
    except OSError as error:
        raise DataError(f"suite {path} cannot be read ({error.strerror})") from None


def _row(name: str, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
        turns = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{name}:{number}: expected a JSON object with `prompt` or `messages`, found {line[:60]!r}"
        ) from None
    if not all(isinstance(m.content, str) and m.content.strip() for m in messages):
        raise DataError(f"{name}:{number}: a message without text; every `content` or `prompt` must be a text")
    if not messages or messages[-1].role != "user":
        raise DataError(f"{name}:{number}: the last message must be a user's")
    return Prompt(str(row.get("id", f"{number}")), str(row.get("category", "all")), messages)
