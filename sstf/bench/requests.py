"""What both servers are asked: the prompts of a suite, or requests that were recorded.

A recorded line is the JSON body of a chat or text completion, or the form that `mirror` writes:
`{"at": 1.25, "path": "chat/completions", "body": {...}}`, `at` in seconds since the recording began.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sstf.errors import DataError

CHAT, TEXT = "chat/completions", "completions"


@dataclass(frozen=True)
class Request:
    """One request. `id` is its own within a load; `body` lacks what the client sets: the model, and streaming."""

    id: str
    path: str  # below /v1/
    body: dict[str, Any]
    at: float | None = None  # seconds since the recording began

    @property
    def greedy(self) -> bool:
        """Whether there is one right answer. Without a temperature the server's own applies."""
        return self.body.get("temperature") == 0


def from_suite(name: str, count: int, max_tokens: int, temperature: float) -> list[Request]:
    """At most `count` prompts from all categories of a suite, see `evaluation.suites`, as chat completions.

    Raises:
        DataError: there is no such suite, or it cannot be read.
    """
    from sstf.evaluation.suites import load_suite  # takes seconds, as it imports torch

    return [
        Request(
            prompt.id,
            CHAT,
            {
                "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
                "max_tokens": max_tokens,
                "temperature": temperature,
                # As vLLM and SGLang hand it to the chat template.
                **({"chat_template_kwargs": {"enable_thinking": prompt.mode == "thinking"}} if prompt.mode else {}),
            },
        )
        for prompt in load_suite(name, count)
    ]


def take(requests: list[Request], start: int, count: int) -> list[Request]:
    """`count` requests from number `start` on, beginning again after the last one, each with an id of its own."""
    found = []
    for i in range(start, start + count):
        again, number = divmod(i, len(requests))
        request = requests[number]
        found.append(replace(request, id=f"{request.id}#{again + 1}") if again else request)
    return found


def read_recorded(path: Path) -> list[Request]:
    """The requests of a JSONL file, in its order.

    Raises:
        DataError: the file cannot be read, holds none, or a line is no request for one answer.
    """
    found = [request_of(f"{path}:{number}", str(number), row) for number, row in json_lines(path)]
    if not found:
        raise DataError(f"{path} holds no request; expected one JSON body of a chat or text completion a line")
    return found


def json_lines(path: Path) -> list[tuple[int, Any]]:
    """The lines of a JSONL file that are not empty, each with its number.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    rows = []
    # Not `splitlines`: JSON allows U+2028 and its like within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise DataError(f"{path}:{number}: expected JSON, found {line[:60]!r}") from None
    return rows


def request_of(where: str, number: str, row: Any) -> Request:
    """A recorded line as a request.

    Args:
        where: for messages.
        number: its id.
        row: the line's JSON.

    Raises:
        DataError: it is no request for one answer.
    """
    body = row.get("body", row) if isinstance(row, dict) else None
    if not isinstance(body, dict) or not ("messages" in body or "prompt" in body):
        raise DataError(f"{where}: expected the body of a completion, with `messages` or `prompt`")
    path = TEXT if "prompt" in body else CHAT
    if row.get("path", path) != path:
        raise DataError(f"{where}: the path is {row['path']!r}, expected {path!r} for such a body")
    at = row.get("at") if "body" in row else None
    if at is not None and not (isinstance(at, (int, float)) and not isinstance(at, bool) and 0 <= at < 1e9):
        raise DataError(f"{where}: `at` is {at!r}, expected seconds since the recording began")
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(token, int) for token in prompt)
    if body.get("n", 1) not in (1, None) or body.get("best_of", 1) not in (1, None) or several:
        raise DataError(f"{where}: asks for several answers; only requests for one answer can be compared")
    left = {key: value for key, value in body.items() if key not in ("model", "stream", "stream_options")}
    return Request(number, path, left, None if at is None else float(at))
