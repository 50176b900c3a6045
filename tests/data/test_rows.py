from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.data.answers import (
    Answer,
    AnsweredConversation,
    answered_from_json,
    answered_to_json,
    conversation_to_json,
    item_to_json,
)
from sstf.data.files import without_nulls
from sstf.data.rows import LEADING_ANSWERS, BadRow, Item, PlainText, Pretokenised, UselessRow, parse_row
from sstf.types import Conversation, Message, ToolCall

SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = ToolCall("weather", {"city": "Bonn"}, "call00001")
USER, HELLO = Message("user", "Hi"), Message("assistant", "Hello")


def parse(row: Any, regenerate: bool = False) -> Item:
    return parse_row(row, "row:1", "test", regenerate).item


def messages(row: Any, regenerate: bool = False) -> tuple[Message, ...]:
    item = parse(row, regenerate)
    assert isinstance(item, Conversation)
    return item.messages


def openai(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, *turns], **fields}


def sharegpt(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


REQUEST_AND_ANSWER = {
    "openai": openai({"role": "assistant", "content": "Hello"}),
    "conversation of roles": {"conversation": openai({"role": "assistant", "content": "Hello"})["messages"]},
    "conversations of roles": {"conversations": openai({"role": "assistant", "content": "Hello"})["messages"]},
    "sharegpt": sharegpt(("human", "Hi"), ("gpt", "Hello")),
    "sharegpt, other names": sharegpt(("user", "Hi"), ("bing", "Hello")),
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is an instruction"},
    "gsm8k": {"question": "Hi", "answer": "Hello"},
    "magpie": {"instruction": "Hi", "response": "Hello", "input": None},
    "pair": {"prompt": "Hi", "response": "Hello"},
    "completion": {"prompt": "Hi", "completion": "Hello"},
    "turns before pairs": {**sharegpt(("human", "Hi"), ("gpt", "Hello")), "instruction": "no", "response": "no"},
}


@pytest.mark.parametrize("name", REQUEST_AND_ANSWER)
def test_forms_of_a_request_and_its_answer(name: str) -> None:
    assert messages(REQUEST_AND_ANSWER[name]) == (USER, HELLO)


def test_alpaca_with_everything() -> None:
    row = {"system": "S", "instruction": "Sum", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert messages(row) == (
        Message("system", "S"),
        USER,
        HELLO,
        Message("user", "Sum\n1 2"),
        Message("assistant", "3"),
    )


def test_requests_alone_are_for_regeneration() -> None:
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f():",
        "canonical_solution": "    pass",
        "test": "",
        "entry_point": "f",
    }
    assert messages(row, regenerate=True) == (Message("user", "def f():"),)
    with pytest.raises(BadRow, match="no assistant turn"):
        parse(row)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_system_prompt_of_a_row_is_for_turns_without_one(key: str) -> None:
    assert messages(sharegpt(("human", "Hi"), ("gpt", "Hello"), **{key: "S"}))[0] == Message("system", "S")
    own = sharegpt(("system", "own"), ("human", "Hi"), ("gpt", "Hello"), **{key: "S"})
    assert messages(own)[0] == Message("system", "own")
    assert messages(sharegpt(("human", "Hi"), ("gpt", "Hello"), **{key: None}))[0] == USER


OPENAI_CALLS = {
    "arguments as text": [
        {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    ],
    "arguments as an object": [{"id": "call00001", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}],
    "flat": [{"id": "call00001", "name": "weather", "arguments": {"city": "Bonn"}}],
    "text of a list": '[{"id": "call00001", "name": "weather", "parameters": {"city": "Bonn"}}]',
}


@pytest.mark.parametrize("name", OPENAI_CALLS)
def test_openai_tool_calls_keep_their_structure(name: str) -> None:
    row = openai(
        {"role": "assistant", "content": None, "tool_calls": OPENAI_CALLS[name]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": [{"type": "text", "text": "sun"}]},
        {"role": "assistant", "content": "Hello"},
        tools=json.dumps([SCHEMA]),
    )
    item = parse(row)
    assert isinstance(item, Conversation)
    result = Message("tool", "sun", tool_call_id="call00001", name="weather")
    assert item.messages == (USER, Message("assistant", "", tool_calls=(CALL,)), result, HELLO)
    assert item.tools == (TOOL,)


def test_older_function_calls_are_converted() -> None:
    row = openai(
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        {"role": "function", "name": "weather", "content": ""},
        functions=[SCHEMA],
    )
    item = parse(row)
    assert isinstance(item, Conversation)
    call = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Bonn"}),))
    assert item.messages == (USER, call, Message("tool", "", name="weather"))
    assert item.tools == (TOOL,)


def test_sharegpt_tool_turns() -> None:
    value = json.dumps({"name": "weather", "arguments": {"city": "Bonn"}})
    row = sharegpt(
        ("human", "Hi"),
        ("function_call", value),
        ("observation", "sun"),
        ("gpt", "Hello"),
        tools=json.dumps([SCHEMA]),
        system="S",
    )
    item = parse(row)
    assert isinstance(item, Conversation)
    call = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Bonn"}),))
    assert item.messages == (Message("system", "S"), USER, call, Message("tool", "sun"), HELLO)
    assert item.tools == (TOOL,)


def test_hermes_tags_become_structure() -> None:
    calls = (
        "I look.\n<tool_call>\n{'arguments': {'city': 'Bonn'}, 'name': 'weather'}\n</tool_call>\n"
        '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
    )
    results = "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    system = "You may call functions. <tools>...</tools>"
    row = sharegpt(("system", system), ("human", "Hi"), ("gpt", calls), ("tool", results), tools=[TOOL])
    item = parse(row)
    assert isinstance(item, Conversation)
    found = (ToolCall("weather", {"city": "Bonn"}), ToolCall("weather", {"city": "Köln"}))
    assert item.messages[2:] == (
        Message("assistant", "I look.", tool_calls=found),
        Message("tool", "sun"),
        Message("tool", "rain"),
    )
    assert item.tools == ()  # the system prompt spells them out


def test_text_about_tags_stays_text() -> None:
    text = "Write <tool_call>{}</tool_call> around it."
    assert messages(sharegpt(("human", "Hi"), ("gpt", text)))[1] == Message("assistant", text)


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "Hello", "reasoning_content": "why"},
        {"content": "Hello", "reasoning": "why"},
        {"content": "Hello", "thinking": "why"},
        {"content": "<think>\nwhy\n</think>\n\nHello"},
        {"content": [{"type": "text", "text": "<think>why</think>Hello"}]},
    ],
)
def test_reasoning_and_the_mode_that_follows(turn: dict[str, Any]) -> None:
    item = parse(openai({"role": "assistant", **turn}))
    assert isinstance(item, Conversation)
    assert item.messages[1] == Message("assistant", "Hello", "why")
    assert item.mode == "thinking"


def test_mode_of_a_row() -> None:
    answer = {"role": "assistant", "content": "<think>\n\n</think>\n\nHello"}
    for given_mode in (None, "plain", "thinking"):
        item = parse(openai(answer, mode=given_mode))
        assert isinstance(item, Conversation)
        assert (item.messages[1], item.mode) == (HELLO, given_mode)


def test_leading_answers_of_sharegpt_are_left_out() -> None:
    parsed = parse_row(sharegpt(("gpt", "x"), ("gpt", "y"), ("human", "Hi"), ("gpt", "Hello")), "1", "test", False)
    assert isinstance(parsed.item, Conversation)
    assert (parsed.item.messages, parsed.repaired) == ((USER, HELLO), LEADING_ANSWERS)
    parsed = parse_row(sharegpt(("system", "S"), ("gpt", "x"), ("human", "Hi"), ("gpt", "Hello")), "1", "test", False)
    assert isinstance(parsed.item, Conversation)
    assert parsed.item.messages == (Message("system", "S"), USER, HELLO)
    assert parse_row(sharegpt(("human", "Hi"), ("gpt", "Hello")), "1", "test", False).repaired is None
    with pytest.raises(BadRow, match="no user turn"):
        parse(sharegpt(("gpt", "x")))


def test_what_cannot_be_regenerated() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": OPENAI_CALLS["flat"]}
    with pytest.raises(UselessRow, match="nothing to regenerate"):
        parse(openai(call), regenerate=True)
    assert len(messages(openai(call))) == 2
    assert len(messages(openai(call, {"role": "tool", "content": "sun"}), regenerate=True)) == 3
    for row in ({"text": "x"}, {"input_ids": [1], "loss_mask": [1]}):
        with pytest.raises(BadRow, match=r"cannot be regenerated: there is no request in .*answers\.kind=keep"):
            parse(row, regenerate=True)


def test_plain_text_and_token_ids() -> None:
    assert parse({"text": "Once", "meta": 1}) == PlainText("row:1", "Once", "test")
    masked = {"id": 3, "input_ids": [5, 6, 7], "loss_mask": [0, 1, True], "attention_mask": [1, 1, 1]}
    assert parse(masked) == Pretokenised("3", [5, 6, 7], [False, True, True], "test")
    labelled = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    assert parse(labelled) == Pretokenised("row:1", [5, 6, 7], [False, True, False], "test")


words = st.text(min_size=1, max_size=8).map(lambda t: "x" + t)
calls = st.builds(
    ToolCall,
    words,
    st.dictionaries(words, st.none() | st.integers() | words | st.lists(words, max_size=2), max_size=2),
    st.none() | words,
)


@st.composite
def rows(draw: st.DrawFn) -> Conversation:
    turns = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        turns.append(Message("user", draw(words)))
        if draw(st.booleans()):
            called = tuple(draw(st.lists(calls, min_size=1, max_size=2)))
            turns.append(Message("assistant", draw(words | st.just("")), draw(st.none() | words), called))
            turns.append(
                Message("tool", draw(words | st.just("")), None, (), draw(st.none() | words), draw(st.none() | words))
            )
        turns.append(Message("assistant", draw(words), draw(st.none() | words)))
    thinks = any(turn.reasoning is not None for turn in turns)
    mode = "thinking" if thinks else draw(st.sampled_from([None, "plain", "thinking"]))
    return Conversation(draw(words), tuple(turns), "test", draw(st.sampled_from([(), (TOOL,), (TOOL, TOOL)])), mode)


@given(item=rows(), cut=st.booleans())
def test_json_rows_are_read_back(item: Conversation, cut: bool) -> None:
    row = json.loads(json.dumps(conversation_to_json(item)))
    assert parse(row) == item
    turns = [i for i, message in enumerate(item.messages) if message.role == "assistant"]
    answers = tuple(None if item.messages[i].tool_calls else Answer((i, 2), True) for i in turns)
    answered = AnsweredConversation(item, answers, cut)
    assert answered_from_json(json.loads(json.dumps(answered_to_json(answered)))) == answered


@pytest.mark.parametrize(
    "item",
    [
        PlainText("1", "x", "test"),
        Pretokenised("1", [1, 2], [False, True], "test"),
        Conversation("1", (USER, HELLO), "test"),
    ],
)
def test_rows_of_every_form_are_read_back(item: Item) -> None:
    assert parse(json.loads(json.dumps(item_to_json(item)))) == item


def test_fields_that_arrow_fills_with_null_are_left_out() -> None:
    turn = {"role": "user", "content": "Hi", "tool_calls": None}
    row = {
        "messages": [turn, {"role": "assistant", "content": None, "calls": [{"a": None, "b": [None, 1]}]}],
        "id": None,
    }
    assert without_nulls(row) == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "calls": [{"b": [None, 1]}]}]
    }
