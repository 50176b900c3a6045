from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase

from sstf.data.build import DataReport, DataTarget, build
from sstf.data.config import DataConfig, JsonlSource, KeepAnswers, RegenerateAnswers, SelfWrittenSource
from sstf.data.conversations import read_conversations
from sstf.data.filters import FilterConfig
from sstf.data.progress import NoProgress
from sstf.data.sampler import Sampler
from sstf.data.tokens import TokenStore, vocabulary_coverage
from sstf.errors import DataError
from sstf.types import TokenSample

MakeSampler = Callable[..., FakeSampler]
# The texts of these tests are too short to differ.
ALL = FilterConfig(near_duplicates=None)


def run_stage(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Callable[[], Sampler],
    folder: Path,
    identity: str = "",
    suites: dict[str, list[str]] | None = None,
) -> DataReport:
    target = DataTarget(tokenizer, 300, sampler, identity)
    return build(config, target, folder, folder / "generated", NoProgress(), suites or {})


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
    config = DataConfig(
        source=JsonlSource(path=file), answers=KeepAnswers(), max_length=14, min_trained_tokens=3, filters=ALL
    )
    report = run_stage(config, tokenizer, no_sampler, tmp_path / "out")
    # Each prompt takes 9 tokens. Answers: Hello ! end (3), Hello x 8 end (9, of which 5 fit), Hi end (2, too few).
    samples = TokenStore(tmp_path / "out").read()
    assert [(s.id, len(s.input_ids), sum(s.loss_mask)) for s in samples] == [("c0", 12, 3), ("c1", 14, 5)]
    assert (report.kept, report.tokens, report.trained_tokens, report.cut_at_max_length) == (2, 26, 8, 1)
    assert report.mask_share == 8 / 26
    assert report.dropped == {"fewer than min_trained_tokens within max_length": 1}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    read = {"read": 3, "kept": 3, "skipped": {}, "repaired": {}}
    assert (written["read"], written["trained_tokens"]) == (read, 8)
    again = DataConfig(source=JsonlSource(path=tmp_path / "out" / "conversations.jsonl"), answers=KeepAnswers())
    assert [c.id for c in read_conversations(again).conversations] == ["c0", "c1"]


def test_regenerated_answers_and_resume(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, file: Path, tmp_path: Path
) -> None:
    config = DataConfig(
        source=JsonlSource(path=file),
        answers=RegenerateAnswers(group_size=1, max_new_tokens=30),
        system_prompt="S",
        filters=ALL,
    )

    def run(folder: str, make: Callable[[], FakeSampler]) -> DataReport:
        return run_stage(config, tokenizer, make, tmp_path / folder)

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
        run_stage(config, tokenizer, make_sampler, tmp_path / "b", "another")


def test_self_written(tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path) -> None:
    config = DataConfig(source=SelfWrittenSource(conversations=9, group_size=8), max_conversations=4)
    report = run_stage(config, tokenizer, make_sampler, tmp_path)
    assert (report.kept, report.read.kept) == (4, 4)
    assert report.read.read == 4 + sum(report.read.skipped.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("conversations.jsonl", "generated", "lint.json", "report.json", "tokens.json", "tokens.safetensors"),
    ]
    assert sorted(path.name for path in (tmp_path / "generated").iterdir()) == [
        *("answers-00000.jsonl", "prompts-00000.jsonl"),
    ]


def test_nothing_left(tokenizer: PreTrainedTokenizerBase, file: Path, tmp_path: Path) -> None:
    config = DataConfig(source=JsonlSource(path=file), answers=KeepAnswers(), max_length=9, filters=ALL)
    with pytest.raises(DataError, match="is left to train on; dropped: 3 fewer than min_trained_tokens"):
        run_stage(config, tokenizer, no_sampler, tmp_path / "out")


def test_implausible_mask_share(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "A"}]
    path.write_text(json.dumps({"messages": turns}))
    config = DataConfig(source=JsonlSource(path=path), answers=KeepAnswers())
    with pytest.raises(DataError, match=r"2 of 510 tokens are trained\. Nothing, or everything, is"):
        run_stage(config, tokenizer, no_sampler, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lint.json"]


def test_each_answer_is_a_sample_of_its_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Hi"), ("assistant", "Hi")]
    path.write_text(json.dumps({"id": "c", "messages": [{"role": r, "content": t} for r, t in turns]}))
    config = DataConfig(source=JsonlSource(path=path), answers=KeepAnswers())
    counted = {}
    for turns_setting in ("every", "each", "last"):
        folder = tmp_path / turns_setting
        run_stage(config.model_copy(update={"turns": turns_setting}), tokenizer, no_sampler, folder)
        counted[turns_setting] = [(s.id, sum(s.loss_mask)) for s in TokenStore(folder).read()]
        assert len((folder / "conversations.jsonl").read_text().splitlines()) == 1
    assert counted == {"every": [("c", 5)], "each": [("c#1", 3), ("c#2", 2)], "last": [("c", 2)]}


def test_text_and_token_ids(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path, text = tmp_path / "data.jsonl", "Hello" * 200
    rows = [{"id": "t", "text": text}, {"id": "i", "input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=JsonlSource(path=path), answers=KeepAnswers())
    # Nearly all of it is trained, which is no sign of a broken template where there is none.
    report = run_stage(config, tokenizer, no_sampler, tmp_path / "out")
    assert (report.tokens, report.trained_tokens) == (203, 201)
    assert [s.id for s in TokenStore(tmp_path / "out").read()] == ["t", "i"]
    again = config.model_copy(update={"source": JsonlSource(path=tmp_path / "out" / "conversations.jsonl")})
    run_stage(again, tokenizer, no_sampler, tmp_path / "again")
    assert TokenStore(tmp_path / "again").read() == TokenStore(tmp_path / "out").read()


def ask(path: Path, *pairs: tuple[str, str]) -> DataConfig:
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=JsonlSource(path=path), answers=KeepAnswers())


def test_repeats_loops_and_evaluation_prompts_are_left_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    question = "Which of the three rivers that cross this plain is the longest one?"
    config = ask(
        tmp_path / "data.jsonl",
        (question, "The one in the north."),
        (question.replace("?", " ?!"), "The one in the south."),
        ("Tell me about bread and salt.", "salt " * 80),
        ("Please write a poem on the moon, the tea and seven lamps.", "Moon, tea."),
        ("What is green?", "Many leaves are."),
    )
    suites = {"poems": ["write a poem on the moon the tea and seven lamps"]}
    report = run_stage(config, tokenizer, no_sampler, tmp_path / "out", suites=suites)
    assert [s.id for s in TokenStore(tmp_path / "out").read()] == ["0", "4"]
    assert report.dropped == {
        "near duplicate of an earlier request": 1,
        "an answer got stuck in a loop": 1,
        "holds an evaluation prompt": 1,
    }
    assert (report.contamination.checked, report.contamination.matched) == (4, {"poems": 1})
    assert report.contamination.examples == {"poems": ["3"]}
    assert report.requests is not None and report.requests.texts == 2

    everything = config.model_copy(update={"filters": FilterConfig(near_duplicates=None, loops=False)})
    assert run_stage(everything, tokenizer, no_sampler, tmp_path / "all").kept == 5


def test_another_filter_generates_nothing_anew(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, file: Path, tmp_path: Path
) -> None:
    config = DataConfig(source=JsonlSource(path=file), answers=RegenerateAnswers(max_new_tokens=30), filters=ALL)
    run_stage(config, tokenizer, make_sampler, tmp_path)
    others = ALL.model_copy(update={"loops": False})
    run_stage(config.model_copy(update={"filters": others, "min_trained_tokens": 2}), tokenizer, no_sampler, tmp_path)


def test_sources_are_kept_beside_the_samples(tokenizer: PreTrainedTokenizerBase, file: Path, tmp_path: Path) -> None:
    other = file.with_name("other.jsonl")
    other.write_text(file.read_text().replace('"id": "c', '"id": "d'))
    config = DataConfig(source=JsonlSource(path=(file, other)), answers=KeepAnswers(), filters=ALL)
    run_stage(config, tokenizer, no_sampler, tmp_path / "out")
    assert TokenStore(tmp_path / "out").sources() == [str(file)] * 3 + [str(other)] * 3
    findings = json.loads((tmp_path / "out" / "lint.json").read_text())
    assert [source["samples"] for source in findings["sources"]] == [3, 3]


def test_vocabulary_coverage_by_hand() -> None:
    # Sample 0 is held out. The others train token 5 three times, 2000 twice and 1 once.
    rest = [[5, 5, 2000], [5, 2000, 1]]
    samples = [TokenSample("0", [5, 1, 1999, 2000], [True] * 4)]
    samples += [TokenSample(str(i + 1), ids, [True] * 3) for i, ids in enumerate(rest)]
    # 1,024 tokens: 5, 2000 and 1, then the smallest ids: 1999 is not among them.
    assert vocabulary_coverage(samples, 4000) == {1024: 0.75, 2048: 1.0}


def test_max_turns_keeps_whole_turns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "ab"), ("assistant", "Hi")]
    path.write_text(json.dumps({"id": "c", "messages": [{"role": r, "content": t} for r, t in turns]}))
    kept = {}
    for most in (1, 2, 3):
        config = DataConfig(source=JsonlSource(path=path), answers=KeepAnswers(), max_turns=most)
        run_stage(config, tokenizer, no_sampler, tmp_path / str(most))
        row = json.loads((tmp_path / str(most) / "conversations.jsonl").read_text())
        kept[most] = [message["content"] for message in row["messages"]]
    assert kept == {1: ["S", "Hi", "Hello"], 2: [t for _, t in turns], 3: [t for _, t in turns]}
