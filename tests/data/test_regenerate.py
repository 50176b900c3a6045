from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase

from sstf.data.answers import AnsweredConversation
from sstf.data.chat_template import render, render_prompt
from sstf.data.config import RegenerateAnswers
from sstf.data.groups import GroupFiles
from sstf.data.progress import NoProgress
from sstf.data.regenerate import regenerate
from sstf.errors import DamagedDataError, DataError
from sstf.types import Conversation, Message

MakeSampler = Callable[..., FakeSampler]
CONFIG = RegenerateAnswers(group_size=3, max_new_tokens=40)


def conversations(count: int) -> list[Conversation]:
    two_turns = (Message("user", "Hi"), Message("assistant", "old"), Message("user", "more?"))
    one_turn = (Message("system", "S"), Message("user", "Hello"), Message("assistant", "old"))
    return [Conversation(f"c{i}", two_turns if i % 2 else one_turn, "test") for i in range(count)]


def run(
    tokenizer: PreTrainedTokenizerBase,
    sampler: FakeSampler,
    folder: Path,
    items: list[Conversation],
    config: RegenerateAnswers = CONFIG,
    max_length: int = 1024,
) -> list[AnsweredConversation]:
    files = GroupFiles(folder, "answers", "target")
    return regenerate(items, tokenizer, sampler, config, files, NoProgress(), max_length)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_answer_is_the_targets(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    sampler = make_sampler()
    result = run(tokenizer, sampler, tmp_path, conversations(7))
    assert [len(item.answers or ()) for item in result] == [1, 2, 1, 2, 1, 2, 1]
    for item in result:
        roles = [m.role for m in item.conversation.messages if m.role != "system"]
        assert roles == ["user", "assistant"] * len(item.answers or ())
        assert all(m.content != "old" for m in item.conversation.messages)
        sample = render(tokenizer, item.conversation, None, answers=item.answers)
        generated = [t for t, own in zip(sample.input_ids, sample.loss_mask, strict=True) if own]
        assert generated == [t for answer in item.answers or () for t in answer.token_ids]
        # The last prompt, as the sampler saw it, is the sample up to its last answer.
        prompt = sample.input_ids[: -len((item.answers or ())[-1].token_ids)]
        assert prompt in sampler.prompts
    assert sum(not a.finished for item in result for a in item.answers or ()) > 0
    assert {params.temperature for params in sampler.params} == {0.0, 0.8}


def test_second_request_follows_the_new_first_answer(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    sampler = make_sampler()
    (item,) = run(tokenizer, sampler, tmp_path, conversations(2)[1:])
    first = render_prompt(tokenizer, (Message("user", "Hi"),))
    assert sampler.prompts[0] == first
    assert item.answers is not None
    history = [*first, *item.answers[0].token_ids]
    assert sampler.prompts[1][: len(history)] == history


def test_killed_run_goes_on_and_ends_with_the_same_bits(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    items = conversations(8)
    unbroken = run(tokenizer, make_sampler(), tmp_path / "a", items)
    # Each group takes two calls, one a turn: the fourth call is the second turn of group 2.
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, make_sampler(fail_at_call=4), tmp_path / "b", items)
    assert list(contents(tmp_path / "b")) == ["answers-00000.jsonl"]
    sampler = make_sampler()
    assert run(tokenizer, sampler, tmp_path / "b", items) == unbroken
    assert sampler.calls == 4
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    # A third run generates nothing, whatever the number of slots.
    idle = make_sampler()
    assert run(tokenizer, idle, tmp_path / "b", items, CONFIG.model_copy(update={"slots": 1})) == unbroken
    assert idle.calls == 0


def test_draws_do_not_depend_on_the_groups(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    one = run(tokenizer, make_sampler(), tmp_path / "a", conversations(7))
    other = run(
        tokenizer, make_sampler(), tmp_path / "b", conversations(7), CONFIG.model_copy(update={"group_size": 2})
    )
    assert one == other
    seeded = run(tokenizer, make_sampler(), tmp_path / "c", conversations(7), CONFIG.model_copy(update={"seed": 1}))
    assert seeded != one


def test_more_conversations_keep_whole_groups(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    run(tokenizer, make_sampler(), tmp_path, conversations(6))
    sampler = make_sampler()
    run(tokenizer, sampler, tmp_path, conversations(9))
    assert sampler.calls == 2


def test_length_limit_ends_a_conversation(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    items = conversations(2)[1:]
    # The prompt takes 9 tokens, and the answer of this stand-in more than the 3 that are left.
    (item,) = run(tokenizer, make_sampler(), tmp_path / "a", items, max_length=12)
    assert item.cut
    assert [m.role for m in item.conversation.messages] == ["user", "assistant"]
    assert item.answers is not None
    assert [(len(a.token_ids), a.finished) for a in item.answers] == [(3, False)]
    (nothing,) = run(tokenizer, make_sampler(), tmp_path / "b", items, max_length=9)
    assert (nothing.answers, nothing.conversation.messages, nothing.cut) == ((), (), True)


def test_groups_of_another_run_are_refused(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    run(tokenizer, make_sampler(), tmp_path, conversations(3))
    with pytest.raises(DataError, match=r"answers-00000\.jsonl was generated from other settings"):
        run(tokenizer, make_sampler(), tmp_path, conversations(3), CONFIG.model_copy(update={"seed": 1}))
    with pytest.raises(DataError, match="other settings, conversations or another target"):
        files = GroupFiles(tmp_path, "answers", "another target")
        regenerate(conversations(3), tokenizer, make_sampler(), CONFIG, files, NoProgress(), 1024)


@pytest.mark.parametrize("position", [5, -5])
def test_altered_group_is_refused(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path, position: int
) -> None:
    run(tokenizer, make_sampler(), tmp_path, conversations(3))
    path = tmp_path / "answers-00000.jsonl"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"answers-00000\.jsonl .*delete it and run again"):
        run(tokenizer, make_sampler(), tmp_path, conversations(3))


def test_group_files_are_readable(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    (item,) = run(tokenizer, make_sampler(), tmp_path, conversations(1))
    _, row = [json.loads(line) for line in (tmp_path / "answers-00000.jsonl").read_text().splitlines()]
    assert item.answers is not None
    assert row["answers"] == [{"token_ids": list(item.answers[0].token_ids), "finished": item.answers[0].finished}]
    assert row["messages"][-1] == {"role": "assistant", "content": item.conversation.messages[-1].content}
