"""What a sample says about the data, against what the data stage then gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sstf.data.config import DataConfig, JsonlSource, KeepAnswers, RegenerateAnswers, SampleSource, SelfWrittenSource
from sstf.data.conversations import read_conversations
from sstf.data.samples import samples as samples_of
from sstf.errors import DataError
from sstf.planning.interval import Interval
from sstf.planning.volume import Sketch, distinct, look, sketch_of, volume, volume_of
from sstf.types import TokenSample


def conversations(path: Path, count: int) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "sun " * (1 + i % 7)},
                {"role": "assistant", "content": "moon " * (1 + i % 11)},
                {"role": "user", "content": "more?"},
                {"role": "assistant", "content": "tea"},
            ][: 2 if i % 3 else 4]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(path: Path, **changes: object) -> DataConfig:
    fields = {"source": JsonlSource(path=path), "answers": KeepAnswers(), "max_length": 128}
    return DataConfig.model_validate(fields | changes)


def test_pieces_and_what_is_cut_by_hand() -> None:
    sketch = Sketch(contexts=(10, 4), answers=(6, 8))
    assert sketch.lengths(100) == (28, 14)
    assert sketch.lengths(25) == (25, 11)  # the second answer loses three tokens
    assert sketch.lengths(18) == (18, 6)  # cut within the second request
    # Answers that are written: of 20 tokens, and not asked for where the request leaves no room.
    assert sketch.lengths(100, answer=20) == (54, 40)
    assert sketch.lengths(34, answer=20) == (30, 20)
    assert sketch.lengths(10, answer=20) == (0, 0)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 60))
def test_a_sketch_has_the_lengths_of_its_sample(mask: list[bool], most: int) -> None:
    end = max((i + 1 for i, flag in enumerate(mask) if flag), default=0)
    cut = mask[:end][:most]
    sample = TokenSample("", [0] * len(mask), mask)
    tokens, trained = sketch_of(sample).lengths(most)
    assert trained == sum(cut)
    assert tokens == len(cut)


def test_kept_answers_that_were_all_looked_at_are_exact(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = config(conversations(tmp_path / "c.jsonl", 30), max_length=40)
    found = volume(look(settings, tokenizer), settings)
    rendered = [s for item in read_conversations(settings).items for s in samples_of(item, tokenizer, "every")]
    lengths = [min(len(s.input_ids), 40) for s in rendered]
    assert found.tokens == Interval.exact(pytest.approx(sum(lengths)))
    assert found.trained == Interval.exact(pytest.approx(sum(sum(s.loss_mask[:40]) for s in rendered)))
    assert found.conversations == 30 and found.longest == max(lengths)
    assert found.cut_share == sum(len(s.input_ids) > 40 for s in rendered) / 30
    assert found.written is None and found.answer is None
    assert found.distinct_trained == len(
        {t for s in rendered for t, f in zip(s.input_ids[:40], s.loss_mask[:40], strict=True) if f}
    )


def test_a_sample_of_many_holds_the_truth(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = config(conversations(tmp_path / "c.jsonl", 900))
    found = volume(look(settings, tokenizer), settings)
    rendered = [s for item in read_conversations(settings).items for s in samples_of(item, tokenizer, "every")]
    truth = sum(len(s.input_ids) for s in rendered)
    assert found.sampled == 200 and found.tokens is not None
    assert found.tokens.low <= truth <= found.tokens.high
    assert found.tokens.high - found.tokens.low < 0.3 * truth


def test_written_answers_are_bounded_or_as_long_as_measured(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = conversations(tmp_path / "c.jsonl", 3)  # five answers: two in the first
    settings = config(path, answers=RegenerateAnswers(max_new_tokens=10))
    seen = look(settings, tokenizer)
    assert seen.turns == pytest.approx(4 / 3) and len(seen.prompts) == 3
    contexts = [sum(s.contexts) for own in seen.sketches for s in own]
    unmeasured = volume(seen, settings)
    assert unmeasured.answer == Interval(1, 10)
    assert unmeasured.written == Interval(pytest.approx(4), pytest.approx(40))
    assert unmeasured.tokens == Interval(pytest.approx(sum(contexts) + 4), pytest.approx(sum(contexts) + 40))
    measured = volume(seen, settings, Interval(5, 6))
    assert measured.trained == Interval(pytest.approx(20), pytest.approx(24))
    # What the target is asked is what the template writes up to where it answers.
    text = tokenizer.decode(seen.prompts[0])
    assert text.endswith("<|im_start|>assistant\n")


def test_a_request_without_an_answer_will_get_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    settings = config(path, answers=RegenerateAnswers(max_new_tokens=4))
    found = volume(look(settings, tokenizer), settings)
    assert found.trained == Interval(1, 4)


def test_self_written_requests_are_counted_before_they_exist(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = SelfWrittenSource(conversations=50, max_prompt_tokens=30)
    settings = DataConfig(source=source, answers=RegenerateAnswers(max_new_tokens=8), max_conversations=20)
    seen = look(settings, tokenizer)
    overhead = seen.sketches[0][0].contexts[0]
    found = volume(seen, settings, answer=Interval(4, 8), request=Interval(10, 20))
    assert found.conversations == 20
    assert found.tokens_each == Interval(overhead + 14, overhead + 28)
    assert found.written == Interval(20 * 14, 20 * 28)
    assert found.distinct_trained is None


@pytest.mark.parametrize(
    ("rows", "most", "found"), [(300, None, None), (300, 50, 50), (300, 1000, 1000), (30, None, 30)]
)
def test_a_hub_is_asked_for_a_few_rows_and_for_their_number(
    rows: int,
    most: int | None,
    found: int | None,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder stands in for the hub: `datasets` loads both alike, and a folder has no card that counts its rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    conversations(tmp_path / "set" / "train.jsonl", rows)
    settings = config(tmp_path, source={"kind": "hub", "name": str(tmp_path / "set")}, max_conversations=most)
    seen = look(settings, tokenizer)
    assert seen.items == found
    assert len(seen.sketches) == min(rows, most or rows, 200)
    assert (volume(seen, settings).tokens is None) == (found is None)


def test_the_source_speaks_as_the_data_stage_does(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        look(config(tmp_path / "nowhere.jsonl"), tokenizer)


def test_different_tokens_grow_with_the_data_by_a_power() -> None:
    # 40 different tokens in the half, 80 in the whole: D grows as N, so four times the data have four times as many.
    parts = [TokenSample(str(i), list(range(10 * i, 10 * i + 10)), [True] * 10) for i in range(8)]
    assert distinct(parts, items=32, sampled=8) == pytest.approx(320)
    assert distinct(parts, items=8, sampled=8) == 80
    assert distinct(parts, items=None, sampled=8) is None
    # The same tokens again and again: no growth.
    same = [TokenSample(str(i), [1, 2, 3], [True] * 3) for i in range(8)]
    assert distinct(same, items=3200, sampled=8) == pytest.approx(3)


def test_the_packaged_sample_is_foreseen_from_a_part_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    settings = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_length=512)
    found = volume(look(settings, tokenizer), settings)
    rendered = [s for item in read_conversations(settings).items for s in samples_of(item, tokenizer, "every")]
    truth = sum(min(512, len(s.input_ids)) for s in rendered)
    assert found.tokens is not None and found.tokens.low * 0.97 <= truth <= found.tokens.high * 1.03


def test_a_finished_data_stage_is_not_estimated() -> None:
    done = volume_of([TokenSample("a", [1, 2, 3], [False, True, True]), TokenSample("b", [4], [True])], 100)
    assert done.tokens == Interval.exact(4) and done.trained == Interval.exact(3)
    assert done.exact and done.distinct_trained == 3 and done.longest == 3 and done.mask_share == 0.75
