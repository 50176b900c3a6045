"""The built-in suite, and suites of the user's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from sstf.errors import DataError
from sstf.evaluation import load_suite
from sstf.types import Message

CATEGORIES = {"chat", "code", "maths", "summary", "translation", "customer service", "recommendation", "extraction"}


def test_builtin_has_64_prompts_spread_over_8_categories() -> None:
    prompts = load_suite("builtin")
    assert len(prompts) == 64
    assert len({prompt.id for prompt in prompts}) == 64
    assert len({prompt.messages for prompt in prompts}) == 64
    counts = Counter(prompt.category for prompt in prompts)
    assert {name.replace("-", " ").replace("_", " ") for name in counts} == CATEGORIES
    assert set(counts.values()) == {8}
    chinese = [p for p in prompts if re.search(r"[一-鿿]", p.messages[-1].content)]
    assert 3 <= len(chinese) <= 24
    assert all(prompt.messages[-1].role == "user" and prompt.messages[-1].content.strip() for prompt in prompts)


@pytest.mark.parametrize("first", [8, 16, 24])
def test_the_first_prompts_cover_all_categories_evenly(first: int) -> None:
    counts = Counter(prompt.category for prompt in load_suite("builtin", first))
    assert set(counts.values()) == {first // 8} and len(counts) == 8


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_forms_of_a_row(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    name = write(
        tmp_path / "suite.jsonl",
        {"prompt": "Hello"},
        {"id": "x", "category": "greeting", "messages": [system, user]},
        {"messages": [user, {"role": "assistant", "content": "Hello"}]},  # a conversation: its answer is dropped
    )
    prompts = load_suite(name)
    assert [(p.id, p.category) for p in prompts] == [("1", "all"), ("x", "greeting"), ("3", "all")]
    assert prompts[0].messages == (Message("user", "Hello"),)
    assert prompts[1].messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert prompts[2].messages == (Message("user", "Hi"),)
    assert load_suite(name, 2) == prompts[:2]


def test_line_separators_within_a_text_are_text(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for `str.splitlines`, and are plain characters in JSON."""
    name = write(tmp_path / "suite.jsonl", {"prompt": "one\u2028two\u0085three"}, {"prompt": "four"})
    assert [p.messages[0].content for p in load_suite(name)] == ["one\u2028two\u0085three", "four"]


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [(p.id, p.messages[0].content) for p in load_suite(str(path))] == [("1", "a"), ("3", "b")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("5", "expected a JSON object"),
        ('{"messages": []}', "the last message must be a user's"),
        ('{"messages": [{"role": "user"}]}', "expected a JSON object"),
        ('{"messages": null}', "expected a JSON object"),
        ('{"prompt": 5}', "a message without text"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: str, expected: str) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"prompt": "fine"}\n' + row)
    with pytest.raises(DataError, match=rf"suite\.jsonl:2: {expected}"):
        load_suite(str(path))


def test_the_limit_does_not_hide_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"prompt": "fine"}\n{')
    with pytest.raises(DataError, match=r"suite\.jsonl:2"):
        load_suite(str(path), 1)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_suite(str(tmp_path / "no.jsonl"))
