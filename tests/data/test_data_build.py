from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase

from sstf.data.build import DataReport, build
from sstf.data.config import DataConfig, JsonlSource, KeepAnswers, RegenerateAnswers, SelfWrittenSource
from sstf.data.conversations import read_conversations
from sstf.data.progress import NoProgress
from sstf.data.tokens import TokenStore
from sstf.errors import DataError

MakeSampler = Callable[..., FakeSampler]


def no_sampler() -> NoReturn:
    raise AssertionError("nothing is to be generated")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    answers = ["Hello!", "Hello" * 8, "Hi"]
    rows = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kept_answers(tokenizer: PreTrainedTokenizerBase, file: Path, tmp_path: Path) -> None:
    config = DataConfig(source=JsonlSource(path=file), answers=KeepAnswers(), max_length=14, min_trained_tokens=3)
    report = build(config, tokenizer, no_sampler, tmp_path / "out", NoProgress())
    # Each prompt takes 9 tokens. Answers: Hello ! end (3), Hello x 8 end (9, of which 5 fit), Hi end (2, too few).
    samples = TokenStore(tmp_path / "out").read()
    assert [(s.id, len(s.input_ids), sum(s.loss_mask)) for s in samples] == [("c0", 12, 3), ("c1", 14, 5)]
    assert (report.kept, report.tokens, report.trained_tokens, report.cut_at_max_length) == (2, 26, 8, 1)
    assert report.mask_share == 8 / 26
    assert report.dropped == {"fewer than min_trained_tokens within max_length": 1}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (written["read"], written["trained_tokens"]) == ({"read": 3, "kept": 3, "skipped": {}}, 8)
    again = DataConfig(source=JsonlSource(path=tmp_path / "out" / "conversations.jsonl"), answers=KeepAnswers())
    assert [c.id for c in read_conversations(again).conversations] == ["c0", "c1"]


def test_regenerated_answers_and_resume(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, file: Path, tmp_path: Path
) -> None:
    config = DataConfig(
        source=JsonlSource(path=file), answers=RegenerateAnswers(group_size=1, max_new_tokens=30), system_prompt="S"
    )

    def run(folder: str, make: Callable[[], FakeSampler]) -> DataReport:
        return build(config, tokenizer, make, tmp_path / folder, NoProgress())

    unbroken = run("a", make_sampler)
    with pytest.raises(KeyboardInterrupt):
        run("b", lambda: make_sampler(fail_at_call=2))
    assert not TokenStore(tmp_path / "b").exists()
    assert run("b", make_sampler) == unbroken
    assert run("b", no_sampler) == unbroken
    for name in ("tokens.safetensors", "tokens.json", "conversations.jsonl", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    samples = TokenStore(tmp_path / "a").read()
    assert tokenizer.convert_ids_to_tokens(samples[0].input_ids[:4]) == ["<|im_start|>", "system", "Ċ", "S"]
    ends = sum(sample.input_ids[-1] == tokenizer.eos_token_id for sample in samples)
    assert unbroken.unfinished_answers == 3 - ends
    with pytest.raises(DataError, match="another target"):
        build(config, tokenizer, make_sampler, tmp_path / "b", NoProgress(), target_name="another")


def test_self_written(tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path) -> None:
    config = DataConfig(source=SelfWrittenSource(conversations=9, group_size=8), max_conversations=4)
    report = build(config, tokenizer, make_sampler, tmp_path, NoProgress())
    assert (report.kept, report.read.kept) == (4, 4)
    assert report.read.read == 4 + sum(report.read.skipped.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("answers-00000.jsonl", "conversations.jsonl", "prompts-00000.jsonl"),
        *("report.json", "tokens.json", "tokens.safetensors"),
    ]


def test_nothing_left(tokenizer: PreTrainedTokenizerBase, file: Path, tmp_path: Path) -> None:
    config = DataConfig(source=JsonlSource(path=file), answers=KeepAnswers(), max_length=9)
    with pytest.raises(DataError, match="No conversation has 1 trained tokens within max_length=9; raise"):
        build(config, tokenizer, no_sampler, tmp_path / "out", NoProgress())


def test_implausible_mask_share(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "A"}]
    path.write_text(json.dumps({"messages": turns}))
    config = DataConfig(source=JsonlSource(path=path), answers=KeepAnswers())
    with pytest.raises(DataError, match=r"0\.4% of the tokens are trained, expected 1% to 99%"):
        build(config, tokenizer, no_sampler, tmp_path / "out", NoProgress())
    assert not (tmp_path / "out").exists()
