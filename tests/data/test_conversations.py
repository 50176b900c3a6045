from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sstf.data import conversations as module
from sstf.data.config import DataConfig, HubSource, JsonlSource, KeepAnswers, RegenerateAnswers, SampleSource
from sstf.data.conversations import ConversationSet, read_conversations
from sstf.data.files import CUT_OFF
from sstf.errors import DataError
from sstf.types import Conversation, Message

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path | tuple[Path, ...], skip: bool = False, limit: int | None = None) -> ConversationSet:
    return read_conversations(
        DataConfig(
            source=JsonlSource(path=path),
            answers=KeepAnswers(),
            on_bad_row="skip" if skip else "stop",
            max_conversations=limit,
        )
    )


def test_both_forms_become_the_same_messages(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "id": 7},
        "",
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
    )
    messages = (Message("system", "S"), Message("user", "Hi"), Message("assistant", "Hello"))
    found = read(path)
    assert found.conversations == [
        Conversation("7", messages, str(path)),
        Conversation(f"{path}:3", messages, str(path)),
    ]
    assert (found.report.read, found.report.kept, found.report.skipped) == (2, 2, {})


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    path = write(tmp_path / "data.jsonl", {"messages": [USER, {"role": "assistant", "content": parts}]})
    assert read(path).conversations[0].messages[1].content == "Hello"


image = {"type": "image_url", "image_url": {"url": "x"}}
BAD_ROWS = {
    "broken JSON": ('{"messages": [', "Expecting value at column 15; expected one JSON object a line"),
    "unknown form: list": ([1], None),
    "unknown form": ({"texts": "x"}, "found texts, expected a key `messages` or `conversations`"),
    "unknown form: turns": ({"messages": "x"}, "`messages` is text, expected a list of turns"),
    "unknown form: turn": ({"messages": ["x"]}, "turn 1 is text, expected an object"),
    "unknown role": (
        {"messages": [{"role": "critic", "content": "x"}]},
        "'critic', expected one of system, developer, user, ass",
    ),
    "empty content": ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"turn 2 \(assistant\) has no text"),
    "empty content: null": ({"messages": [{"role": "user", "content": None}]}, "no text"),
    "non-text content": ({"messages": [{"role": "user", "content": [image]}]}, "turn 1 has a part of type 'image_url'"),
    "non-text content: number": ({"messages": [{"role": "user", "content": 3}]}, "a number in `content`"),
    "non-text content: images": ({**GOOD, "images": ["x.png"]}, "the row has `images`; targets here read text only"),
    "non-text content: audio": ({"messages": [{**USER, "audio": {"id": 1}}, ANSWER]}, "turn 1 has `audio`"),
    "broken tool call": ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "turn 2: a tool call has no function"),
    "broken tool call: text": (
        {"messages": [USER, {**ANSWER, "function_call": {"name": "f", "arguments": "{'x': g()}"}}]},
        "the arguments of 'f' cannot be read as JSON",
    ),
    "broken tool call: list": (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
        "the arguments of 'f' are no object",
    ),
    "broken tools": ({**GOOD, "tools": "[{"}, "the tool schemas cannot be read as JSON"),
    "broken tools: no name": ({**GOOD, "tools": [{"type": "function"}]}, "a tool schema has no function name"),
    "unknown mode": ({**GOOD, "mode": "chat"}, "`mode` is 'chat', expected `thinking` or `plain`"),
    "reasoning in plain mode": ({"messages": [USER, {**ANSWER, "reasoning": "why"}], "mode": "plain"}, None),
    "non-text content: reasoning": ({"messages": [USER, {**ANSWER, "reasoning": [1]}]}, "a list as reasoning"),
    "roles out of turn: result": (
        {"messages": [USER, {"role": "tool", "content": "3"}]},
        "turn 2 is tool, expected assistant",
    ),
    "roles out of turn: call": ({"messages": [USER, CALL, USER]}, "turn 3 is user, expected tool"),
    "roles out of turn: after result": (
        {"messages": [USER, CALL, {"role": "tool", "content": "3"}, USER]},
        "turn 4 is user, expected tool or assistant",
    ),
    "bad token ids": ({"input_ids": [1, 2.5], "loss_mask": [0, 1]}, "not a list of whole numbers"),
    "bad token ids: alone": ({"input_ids": [1, 2]}, "expected a `loss_mask` or `labels`"),
    "bad token ids: lengths": (
        {"input_ids": [1, 2], "loss_mask": [1]},
        "has 1 entries, expected one for each of the 2",
    ),
    "bad token ids: mask": ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "something else than 0, 1"),
    "bad token ids: shifted": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "has 2 at 0, .* must not be shifted"),
    "unknown form: history": ({"instruction": "a", "output": "b", "history": ["x"]}, "`history` is not a list of"),
    "empty content: text": ({"text": " "}, "the row has no text in `text`"),
    "no user turn": ({"messages": [{"role": "system", "content": "S"}]}, "found system, expected at least one user"),
    "no user turn: empty": ({"messages": []}, "found no turns"),
    "no assistant turn": ({"messages": [USER]}, "answers.kind=regenerate"),
    "assistant first": ({"messages": [ANSWER, USER]}, "expected a user turn before it"),
    "roles out of turn": ({"messages": [USER, USER]}, "turn 2 is user, expected assistant"),
    "broken text": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    "duplicate id": ({**GOOD, "id": "one"}, "'one' was used by an earlier row"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_stops_with_its_line_or_is_counted(name: str, tmp_path: Path) -> None:
    row, detail = BAD_ROWS[name]
    reason = name.split(":")[0]
    path = write(tmp_path / "data.jsonl", {**GOOD, "id": "one"}, row, {**GOOD, "id": "three"})
    with pytest.raises(DataError, match=rf"data\.jsonl:2: {reason}: .*{detail or ''}"):
        read(path)
    found = read(path, skip=True)
    assert [c.id for c in found.conversations] == ["one", "three"]
    assert (found.report.read, found.report.kept, found.report.skipped) == (3, 2, {reason: 1})


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: broken text: byte 15 is not UTF-8"):
        read(path)


def test_request_alone_is_enough_for_regeneration(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [USER]})
    config = DataConfig(source=JsonlSource(path=path), answers=RegenerateAnswers())
    assert read_conversations(config).conversations[0].messages == (Message("user", "Hi"),)


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, GOOD, "broken")
    found = read(path, limit=2)
    assert (found.report.read, found.report.kept) == (2, 2)


def test_several_files_in_order_and_gzip(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "a.jsonl", {**GOOD, "id": "a"}), tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({**GOOD, "id": "b"}).encode()))
    assert [c.id for c in read((plain, packed)).conversations] == ["a", "b"]


def test_array_and_a_dump_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    row = {"conversations": [{"from": "human", "value": 'H"ä\n'}, {"from": "gpt", "value": "\U0001f600"}], "ok": True}
    whole = json.dumps([row, row], indent=1).encode()
    path.write_bytes(whole)
    found = read(path)
    assert [c.id for c in found.conversations] == [f"{path}:1", f"{path}:2"]
    assert found.report.skipped == {}
    second = whole.rindex(b'{\n  "conversations"')
    for end in range(second + 1, whole.rindex(b"}") + 1):
        path.write_bytes(whole[:end])
        found = read(path)
        assert (found.report.kept, found.report.skipped) == (1, {CUT_OFF: 1}), whole[second:end]


def test_record_broken_within_an_array(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text("[\n" + json.dumps(GOOD) + ',\n{"messages" []},\n' + json.dumps(GOOD) + "\n]")
    with pytest.raises(DataError, match=r"dump\.json:3 \(record 2\): broken JSON: Expecting ':'"):
        read(path, skip=True)


def test_bad_record_of_an_array_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text("[\n" + json.dumps(GOOD) + ",\n\n" + json.dumps({"value": 1}) + "\n]")
    with pytest.raises(DataError, match=r"dump\.json:4 \(record 2\): unknown form"):
        read(path)


def test_empty_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable conversation: 0 rows read"):
        read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="1 rows read, skipped: 1 unknown form"):
        read(write(tmp_path / "useless.jsonl", {}), skip=True)
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read(tmp_path / "none.jsonl")
    packed = tmp_path / "half.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read(packed)


def test_missing_sample_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", Path("no-such-sample.jsonl.gz"))
    with pytest.raises(DataError, match=r"sample no-such-sample\.jsonl\.gz is missing"):
        read_conversations(DataConfig(source=SampleSource()))


def test_hub_rows_from_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([GOOD, {"messages": [USER]}])
    asked = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        asked.update(options, name=name, subset=subset)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubSource(name="org/set", subset="part", split="test", revision="v1")
    found = read_conversations(DataConfig(source=source, answers=KeepAnswers(), on_bad_row="skip"))
    assert [(c.id, c.source) for c in found.conversations] == [("org/set/test:1", "org/set/test")]
    assert found.report.skipped == {"no assistant turn": 1}
    options = {"split": "test", "revision": "v1", "streaming": False, "data_files": None}
    assert asked == {"name": "org/set", "subset": "part", **options}


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), ValueError("Unknown split"), FileNotFoundError()]
)
def test_hub_failure_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'org/set' \(subset None, split train\) cannot be loaded: \w") as caught:
        read_conversations(DataConfig(source=HubSource(name="org/set")))
    assert "\n" not in str(caught.value)
