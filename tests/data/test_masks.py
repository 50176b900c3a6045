"""What the target generates is trained, and nothing else, whatever the template does around it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from chat_templates import FAMILIES, R1, Family, use
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sstf.data.answers import Answer, conversation_to_json
from sstf.data.chat_template import TurnRenderer, render, render_prompt, render_turns
from sstf.data.template import chat_template
from sstf.errors import DataError
from sstf.types import Conversation, Message, TokenSample, ToolCall

TOOLS = (
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
)
CALL = ToolCall("weather", {"city": "Bonn"}, "call00001")
CALLING = (
    Message("user", "Hi"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "sun", tool_call_id="call00001"),
    Message("assistant", "Hello"),
)


def trained_texts(tokenizer: PreTrainedTokenizerBase, sample: TokenSample) -> list[str]:
    """The text of every stretch of trained tokens."""
    pairs = zip(sample.input_ids, sample.loss_mask, strict=True)
    return [
        tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1])
        if trained
    ]


def engine_text(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, end: int) -> str:
    """The history as transformers renders it from a plain JSON row: nothing of ours is in between."""
    row = json.loads(json.dumps(conversation_to_json(conversation)))
    variables = {} if conversation.mode is None else {"enable_thinking": conversation.mode == "thinking"}
    if chat_template(tokenizer).reasoning_key is None:
        for message in row["messages"]:
            if thought := message.pop("reasoning_content", None):
                message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    text = tokenizer.apply_chat_template(
        row["messages"][: end + 1], tools=row.get("tools"), tokenize=False, add_generation_prompt=False, **variables
    )
    assert isinstance(text, str)
    return text


texts = st.text(st.sampled_from('Hi user\n<|>{}"elöo.😀[]'), min_size=1, max_size=10).filter(lambda t: t == t.strip())
arguments = st.dictionaries(st.sampled_from(["city", "n"]), texts | st.integers() | st.none(), max_size=2)


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Conversation:
    messages = [Message("system", draw(texts))] if family.system and draw(st.booleans()) else []
    thinking = family.thinks and draw(st.booleans())

    def answer(content: str, calls: tuple[ToolCall, ...] = ()) -> Message:
        return Message("assistant", content, draw(texts) if thinking else None, calls)

    used = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if family.calls else 0):
            number = draw(st.integers(1, family.calls))
            calls = tuple(ToolCall("weather", draw(arguments), f"call{used + i:05d}") for i in range(number))
            used += number
            content = draw(texts | st.just("")) if family.text_beside_calls else ""
            messages.append(answer(content, calls))
            messages += [Message("tool", draw(texts), tool_call_id=call.id) for call in calls]
        messages.append(answer(draw(texts)))
    tools = TOOLS if family.calls and draw(st.booleans()) else ()
    return Conversation("c1", tuple(messages), "test", tools, "thinking" if thinking else family.plain)


@pytest.fixture(scope="module", params=FAMILIES)
def family_and_tokenizer(
    request: pytest.FixtureRequest, tokenizer_folder: Path
) -> tuple[Family, PreTrainedTokenizerBase]:
    family = FAMILIES[request.param]
    return family, use(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder), family)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_trained_tokens_are_what_the_assistant_says(
    family_and_tokenizer: tuple[Family, PreTrainedTokenizerBase], data: st.DataObject
) -> None:
    family, tokenizer = family_and_tokenizer
    item = data.draw(conversations(family))
    answers = [i for i, message in enumerate(item.messages) if message.role == "assistant"]
    said = [family.said(item.messages[i], item.mode) for i in answers]
    samples = render_turns(tokenizer, item, "each")
    assert [sample.id for sample in samples] == [f"c1#{number}" for number in range(1, len(answers) + 1)]
    for i, expected, sample in zip(answers, said, samples, strict=True):
        assert trained_texts(tokenizer, sample) == [expected]
        prompt = render_prompt(tokenizer, item.messages[:i], item.tools, item.mode)
        assert sample.input_ids[: len(prompt)] == prompt
        assert sample.loss_mask == [False] * len(prompt) + [True] * (len(sample.loss_mask) - len(prompt))
        whole = tokenizer.decode(sample.input_ids, skip_special_tokens=False)
        assert engine_text(tokenizer, item, i).startswith(whole)
    (last,) = render_turns(tokenizer, item, "last")
    assert (last.id, last.input_ids, last.loss_mask) == ("c1", samples[-1].input_ids, samples[-1].loss_mask)
    if family.keeps_history or len(answers) == 1:
        (every,) = render_turns(tokenizer, item, "every")
        assert trained_texts(tokenizer, every) == said
        whole = tokenizer.decode(every.input_ids, skip_special_tokens=False)
        assert engine_text(tokenizer, item, answers[-1]).startswith(whole)


def test_thinking_turn_with_a_tool_call_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    messages = (Message("user", "Hi"), Message("assistant", "", "Hello", (CALL,)))
    (sample,) = render_turns(tokenizer, Conversation("c1", messages, "test", TOOLS, "thinking"), "every")
    context, said = "".join(tokenizer.convert_ids_to_tokens(sample.input_ids)).split("assistantĊ")
    assert context.endswith("<|im_start|>userĊHi<|im_end|>Ċ<|im_start|>")
    assert '"weather"' in context
    assert said == (
        '<think>ĊHelloĊ</think>ĊĊ<tool_call>Ċ{"name":Ġ"weather",Ġ"arguments":Ġ{"city":Ġ"Bonn"}}Ċ</tool_call><|im_end|>'
    )
    assert sample.loss_mask.index(True) == len(sample.input_ids) - sum(sample.loss_mask)
    assert sum(sample.loss_mask) == len(tokenizer(trained_texts(tokenizer, sample)[0])["input_ids"])


def test_tool_results_and_calls_before_them(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["mistral"])
    item = Conversation("c1", CALLING, "test", TOOLS)
    (sample,) = render_turns(tokenizer, item, "every")
    # `[TOOL_CALLS]` is a special token inside the turn: it is trained, and does not end it.
    assert trained_texts(tokenizer, sample) == [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn"}, "id": "call00001"}]</s>',
        " Hello</s>",
    ]
    (last,) = render_turns(tokenizer, item, "last")
    assert trained_texts(tokenizer, last) == [" Hello</s>"]
    assert last.input_ids == sample.input_ids


def test_history_without_reasoning_is_named_with_the_way_out(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    turns = (
        Message("user", "Hi"),
        Message("assistant", "A", "why"),
        Message("user", "?"),
        Message("assistant", "B", "b"),
    )
    item = Conversation("c1", turns, "test", mode="thinking")
    with pytest.raises(DataError, match=r"c1, turn 3: the history is not kept.*data\.turns=each.*data\.turns=last"):
        render_turns(tokenizer, item, "every")
    first, second = render_turns(tokenizer, item, "each")
    assert trained_texts(tokenizer, first) == ["<think>\nwhy\n</think>\n\nA<|im_end|>"]
    assert trained_texts(tokenizer, second) == ["<think>\nb\n</think>\n\nB<|im_end|>"]
    assert "why" not in tokenizer.decode(second.input_ids)


def test_mode_decides_what_the_prompt_holds(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    turns = (Message("user", "Hi"), Message("assistant", "A"))
    (plain,) = render_turns(tokenizer, Conversation("c1", turns, "test", mode="plain"), "every")
    assert trained_texts(tokenizer, plain) == ["A<|im_end|>"]
    assert "<think>\n\n</think>\n\nA<|im_end|>" in tokenizer.decode(plain.input_ids)
    # Without a mode the template puts an empty think block into the answer, which the target would have to write.
    with pytest.raises(DataError, match=r"expected 'A', the template wrote '<think>.*rows need `mode: plain`"):
        render(tokenizer, Conversation("c1", turns, "test"), None)


REFUSED = {
    "calls": ("chatml", CALLING, "c1: The chat template does not write tool calls"),
    "calls without a name": ("gemma", CALLING, "does not write tool calls"),
    "text beside a call": (
        "llama31",
        (CALLING[0], Message("assistant", "I look", tool_calls=(CALL,))),
        r"c1, turn 2: the chat template leaves out the answer's text 'I look'",
    ),
    "two calls": (
        "llama31",
        (CALLING[0], Message("assistant", "", tool_calls=(CALL, CALL))),
        r"c1: The chat template refuses the turns \(user, assistant\): This model calls one tool",
    ),
    "call without an identity": (
        "mistral",
        (CALLING[0], Message("assistant", "", tool_calls=(ToolCall("weather", {}),))),
        "IDs should be alphanumeric strings with length 9",
    ),
    "reasoning": ("chatml", (CALLING[0], Message("assistant", "A", "why")), "c1: An answer carries reasoning"),
    "reasoning beside a call": (
        "mistral",
        (CALLING[0], Message("assistant", "", "why", (CALL,))),
        "carries reasoning, and the chat template has no place for it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_leave_something_out_are_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    family, messages, problem = REFUSED[name]
    use(tokenizer, FAMILIES[family])
    for turns in ("every", "each", "last"):
        with pytest.raises(DataError, match=problem):
            render_turns(tokenizer, Conversation("c1", messages[:2], "test"), turns)


def test_reasoning_that_the_template_drops_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = R1
    item = Conversation("c1", (Message("user", "Hi"), Message("assistant", "A", "why")), "test")
    with pytest.raises(DataError, match="the prompt is not a prefix of the answered turn"):
        render(tokenizer, item, None)
    tokenizer.chat_template = R1.replace("<think>\n", "")
    with pytest.raises(DataError, match=r"expected '<think>.*the template wrote 'A'"):
        render(tokenizer, item, None)


def test_call_name_that_the_template_drops(tokenizer: PreTrainedTokenizerBase) -> None:
    family = FAMILIES["qwen3"]
    use(tokenizer, family)
    tokenizer.chat_template = family.template.replace("call.function.name", "'tool'")
    with pytest.raises(DataError, match="leaves out the answer's call of the tool 'weather'"):
        render(tokenizer, Conversation("c1", CALLING, "test", TOOLS), None)


def test_marker_of_its_own_for_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    family = FAMILIES["llama31"]
    use(tokenizer, family)
    tokenizer.chat_template = family.template.replace("'}<|eot_id|>'", "'}<|eom_id|>'")
    (sample,) = render_turns(tokenizer, Conversation("c1", CALLING, "test"), "every")
    assert trained_texts(tokenizer, sample) == [
        '{"name": "weather", "parameters": {"city": "Bonn"}}<|eom_id|>',
        "Hello<|eot_id|>",
    ]


def test_end_of_turn_text_inside_an_answer_does_not_end_it(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    call = ToolCall("weather", {"city": "<|im_end|>"})
    item = Conversation("c1", (Message("user", "Hi"), Message("assistant", "a<|im_end|>b", "r", (call,))), "test")
    (sample,) = render_turns(tokenizer, item, "every")
    (said,) = trained_texts(tokenizer, sample)
    assert said.endswith('{"city": "<|im_end|>"}}\n</tool_call><|im_end|>')


def test_turn_that_ends_in_an_unknown_way_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template += "{% if messages[-1]['content'] == 'odd' %}{{ 'more' }}{% endif %}"
    item = Conversation("c1", (Message("user", "Hi"), Message("assistant", "odd")), "test")
    with pytest.raises(
        DataError, match=r"c1, turn 2: the chat template ends this turn with .*more', expected '<\|im_end"
    ):
        render(tokenizer, item, None)


def test_errors_inside_a_template_are_one_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages[0].content + 3 }}"
    with pytest.raises(DataError, match=r"refuses the turns \(user\): can only concatenate str"):
        render_prompt(tokenizer, (Message("user", "Hi"),))


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("<think>\nwhy\n</think>\n\nA", None, Message("assistant", "A", "why")),
        ("<think>why</think>A </think>", "thinking", Message("assistant", "A </think>", "why")),
        ("<think>\n\n</think>\n\nA", None, Message("assistant", "A")),
        ("<think>\ncut off", None, Message("assistant", "", "cut off")),
        ("A <think>b</think>", None, Message("assistant", "A <think>b</think>")),
        ("<think>b</think>A", "plain", Message("assistant", "<think>b</think>A")),
    ],
)
def test_generated_text_becomes_reasoning_and_answer(
    text: str, mode: str | None, message: Message, tokenizer: PreTrainedTokenizerBase
) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    assert chat_template(tokenizer).split_reasoning(text, mode) == message  # type: ignore[arg-type]


def test_prompt_that_opens_the_think_block(tokenizer: PreTrainedTokenizerBase) -> None:
    family = FAMILIES["qwen3"]
    use(tokenizer, family)
    tokenizer.chat_template = family.template.replace(
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
        "{{- '<think>\n' }}",
    )
    split = chat_template(tokenizer).split_reasoning
    assert split("why\n</think>\n\nA", None) == Message("assistant", "A", "why")
    assert split("cut off", None) == Message("assistant", "", "cut off")
    item = Conversation("c1", (Message("user", "Hi"), Message("assistant", "A", "why")), "test")
    (sample,) = render_turns(tokenizer, item, "every")
    assert trained_texts(tokenizer, sample) == ["why\n</think>\n\nA<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "inline", "gemma"])
def test_without_a_reasoning_field_generated_text_stays_whole(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES[name])
    text = "<think>\nwhy\n</think>\n\nA"
    assert chat_template(tokenizer).split_reasoning(text, None) == Message("assistant", text)


def test_turns_that_were_not_generated_are_context(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    h, end = tokenizer.convert_tokens_to_ids(["H", "<|im_end|>"])
    item = Conversation("c1", (*CALLING[:3], Message("assistant", "H")), "test", TOOLS, "plain")
    answers = (None, Answer((h, end), True))
    for turns in ("every", "last"):
        (sample,) = render_turns(tokenizer, item, turns, answers)  # type: ignore[arg-type]
        assert sample.loss_mask == [False] * (len(sample.loss_mask) - 2) + [True, True]
        assert "</tool_response>" in tokenizer.decode(sample.input_ids)
    (each,) = render_turns(tokenizer, item, "each", answers)
    assert (each.id, sum(each.loss_mask)) == ("c1#2", 2)
    assert render_turns(tokenizer, item, "each", (None, None)) == [TokenSample("c1", [], [])]


def test_taken_thoughts_are_found_again_in_a_history_that_keeps_them(tokenizer: PreTrainedTokenizerBase) -> None:
    family = FAMILIES["qwen3"]
    use(tokenizer, family)
    tokenizer.chat_template = family.template.replace(
        "loop.index0 > ns.request and (loop.last or reasoning)", "reasoning"
    )
    text = "<think>why</think>A"  # without the line breaks that the template puts around reasoning
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    renderer = TurnRenderer(tokenizer, "c1")
    first = renderer.ask([Message("user", "Hi")])
    renderer.take(Answer((*ids, end), True))
    history = [Message("user", "Hi"), chat_template(tokenizer).split_reasoning(text, None), Message("user", "?")]
    second = renderer.ask(history)
    assert second[: len(first) + len(ids) + 1] == [*first, *ids, end]
    assert (
        tokenizer.decode(second[len(first) + len(ids) + 1 :])
        == "\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )
