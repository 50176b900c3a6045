"""Regeneration with tools, with reasoning, and with every turn asked as an engine would be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from chat_templates import FAMILIES, use
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase

from sstf.data.answers import AnsweredConversation
from sstf.data.chat_template import render_prompt, render_turns
from sstf.data.config import RegenerateAnswers, Turns
from sstf.data.groups import GroupFiles
from sstf.data.progress import NoProgress
from sstf.data.regenerate import regenerate
from sstf.data.sampler import Sampler
from sstf.errors import DataError
from sstf.types import Conversation, Message, Sampled, SamplingParams, ToolCall

CONFIG = RegenerateAnswers(group_size=2)
CALL = Message("assistant", "I look", tool_calls=(ToolCall("weather", {"city": "Bonn"}, "call00001"),))
RESULT = Message("tool", "sun", tool_call_id="call00001")
WITH_TOOLS = (
    *(Message("user", "Hi"), CALL, RESULT, Message("assistant", "old")),
    *(Message("user", "more?"), Message("assistant", "older"), Message("user", "bye"), CALL),
)
THINKING = (Message("user", "Hi"), Message("assistant", "old", "old thought"), Message("user", "?"))


class Script:
    """A target that writes these texts, one a request; `+` at the end stands for the end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.prompts: list[str] = []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        self.prompts += [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        return [self._one(self.texts.pop(0)) for _ in prompts]

    def _one(self, text: str) -> Sampled:
        ids = list(self.tokenizer(text.removesuffix("+"), add_special_tokens=False)["input_ids"])
        ended = text.endswith("+")
        return Sampled(ids + [int(self.tokenizer.eos_token_id)] * ended, finished=ended)


def run(
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    folder: Path,
    items: Sequence[Conversation],
    turns: Turns = "every",
    max_length: int = 4096,
) -> list[AnsweredConversation]:
    files = GroupFiles(folder, "answers", "target")
    return regenerate(items, tokenizer, sampler, CONFIG, files, NoProgress(), max_length, turns)


def test_tool_calls_are_context_and_texts_are_new(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    sampler = Script(tokenizer, ["one+", "two+"])
    item = Conversation("c", WITH_TOOLS, "test", mode="plain")
    (result,) = run(tokenizer, sampler, tmp_path, [item], "each")
    new = [Message("assistant", "one"), Message("assistant", "two")]
    assert result.conversation == Conversation(
        "c", (*WITH_TOOLS[:3], new[0], WITH_TOOLS[4], new[1]), "test", mode="plain"
    )
    assert result.answers is not None
    assert [answer is None for answer in result.answers] == [True, False, False]
    # The request that the data answered with a call alone has nothing to write.
    assert len(sampler.prompts) == 2
    samples = render_turns(tokenizer, result.conversation, "each", result.answers)
    assert [sample.id for sample in samples] == ["c#2", "c#3"]
    for prompt, sample, answer in zip(sampler.prompts, samples, result.answers[1:], strict=True):
        assert answer is not None
        assert sample.loss_mask.count(True) == len(answer.token_ids)
        assert tokenizer.decode(sample.input_ids) == prompt + tokenizer.decode(list(answer.token_ids))
    assert "<tool_call>" in sampler.prompts[0] and sampler.prompts[0].endswith("<think>\n\n</think>\n\n")


def test_tools_reach_the_target(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    tool = {"type": "function", "function": {"name": "sundial", "parameters": {}}}
    sampler = Script(tokenizer, ["one+"])
    run(tokenizer, sampler, tmp_path, [Conversation("c", (Message("user", "Hi"),), "test", (tool,))])
    assert "sundial" in sampler.prompts[0]


@pytest.mark.parametrize("turns", ["each", "last"])
def test_history_is_what_the_engine_renders(turns: Turns, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    thought = "<think>why</think>one"  # not the line breaks of the template: the ids are kept as they are
    sampler = Script(tokenizer, [thought + "+", "<think>\nbecause\n</think>\n\ntwo+"])
    item = Conversation("c", THINKING, "test", mode="thinking")
    (result,) = run(tokenizer, sampler, tmp_path, [item], turns)
    assert result.conversation.messages == (
        *(Message("user", "Hi"), Message("assistant", "one", "why")),
        *(Message("user", "?"), Message("assistant", "two", "because")),
    )
    history = render_prompt(tokenizer, result.conversation.messages[:3], mode="thinking")
    assert sampler.prompts[1] == tokenizer.decode(history)
    assert "why" not in sampler.prompts[1] and "old" not in sampler.prompts[1]
    assert result.answers is not None and result.answers[0] is not None
    assert tokenizer.decode(list(result.answers[0].token_ids)) == thought + "<|im_end|>"
    samples = render_turns(tokenizer, result.conversation, turns, result.answers)
    assert [sample.id for sample in samples] == (["c#1", "c#2"] if turns == "each" else ["c"])
    assert tokenizer.decode(samples[-1].input_ids) == sampler.prompts[1] + "<think>\nbecause\n</think>\n\ntwo<|im_end|>"


def test_one_sequence_is_refused_where_the_history_changes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    sampler = Script(tokenizer, ["<think>\nwhy\n</think>\n\none+"])
    with pytest.raises(DataError, match=r"data\.turns=each"):
        run(tokenizer, sampler, tmp_path, [Conversation("c", THINKING, "test", mode="thinking")])


def test_thought_that_was_cut_stays_out_of_the_history(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    use(tokenizer, FAMILIES["qwen3"])
    sampler = Script(tokenizer, ["<think>\nendless", "two+"])
    (result,) = run(tokenizer, sampler, tmp_path, [Conversation("c", THINKING, "test", mode="thinking")], "each")
    assert result.conversation.messages[1] == Message("assistant", "", "endless")
    assert "endless" not in sampler.prompts[1]


@pytest.mark.parametrize("turns", ["every", "each"])
def test_killed_run_with_tools_ends_with_the_same_bits(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, make_sampler: Callable[..., FakeSampler]
) -> None:
    use(tokenizer, FAMILIES["llama31"])
    call = Message("assistant", "", tool_calls=CALL.tool_calls)
    messages = tuple(call if message is CALL else message for message in WITH_TOOLS)
    items = [Conversation(f"c{i}", messages[: 2 * i + 4], "test") for i in range(3)]
    unbroken = run(tokenizer, make_sampler(), tmp_path / "a", items, turns)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, make_sampler(fail_at_call=3), tmp_path / "b", items, turns)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["answers-00000.jsonl"]
    assert run(tokenizer, make_sampler(), tmp_path / "b", items, turns) == unbroken
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    other: Turns = "last" if turns == "each" else "each"
    if turns == "each":  # `each` and `last` ask the same, so they share what was generated
        assert run(tokenizer, make_sampler(fail_at_call=1), tmp_path / "b", items, other) == unbroken
    else:
        with pytest.raises(DataError, match="other settings"):
            run(tokenizer, make_sampler(), tmp_path / "b", items, other)
