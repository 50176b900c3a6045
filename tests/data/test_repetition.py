from __future__ import annotations

import gzip
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_texts import PLAIN_TEXTS
from transformers import AutoTokenizer

from sstf.data.conversations import SAMPLE
from sstf.data.repetition import COPIES, FILLED, MIN_TOKENS, Repetition, repetition
from sstf.targets.embedded import locate


def fresh(count: int, start: int = 1000) -> list[int]:
    """Ids that repeat nothing."""
    return list(range(start, start + count))


def words_as_ids(text: str) -> list[int]:
    """Ids of words, spaces and signs: about what a tokenizer would give, without one."""
    pieces = [found.group() for found in re.finditer(r" ?\w+|\s+|([^\w\s])\1*", text)]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return [ids[piece] for piece in pieces]


def brute_force(ids: list[int]) -> Repetition | None:
    """The rule for cycles as it is written down, tried for every period and every place."""
    best: tuple[int, int, int] | None = None
    for period in range(1, len(ids) // COPIES + 1):
        start = 0
        for end in range(period, len(ids) + 1):
            if end < len(ids) and ids[end] == ids[end - period]:
                continue
            length = end - start
            counts = end >= len(ids) - 1 or length >= FILLED * len(ids)
            if counts and length >= max(MIN_TOKENS, COPIES * period):
                best = max(best or (0, 0, 0), (length, -period, start))
            start = end - period + 1
    return None if best is None else Repetition(-best[1], best[2], best[0] / len(ids))


def test_a_cycle_at_the_end() -> None:
    ids = [*fresh(200), *([1, 2, 3, 4, 5] * 12)]
    assert repetition(ids) == Repetition(period=5, start=200, share=60 / 260)
    assert repetition([*ids, 9]) == Repetition(5, 200, 60 / 261), "the end token may follow"
    assert repetition([*ids, 8, 9]) is None, "the model found out by itself, and most of the answer is new"


def test_a_cycle_that_breaks_off_within_a_copy() -> None:
    assert repetition([*fresh(10), *([1, 2, 3, 4, 5, 6, 7] * 9)[:-3]]) == Repetition(7, 10, 60 / 70)


def test_one_token_over_and_over() -> None:
    assert repetition([5] * 300) == Repetition(1, 0, 1.0)
    assert repetition([*fresh(300), *[5] * 48]) == Repetition(1, 300, 48 / 348)
    assert repetition([*fresh(300), *[5] * 47]) is None, "a separator line"


def test_a_cycle_that_fills_half_of_the_answer() -> None:
    cycle = fresh(20) * 4
    assert repetition([*fresh(40, 2000), *cycle, *fresh(40, 3000)]) == Repetition(20, 40, 0.5)
    assert repetition([*fresh(41, 2000), *cycle, *fresh(40, 3000)]) is None


def test_two_copies_are_no_loop() -> None:
    assert repetition([*fresh(5, 1), *fresh(300) * 2]) is None


def test_a_loop_with_a_counter() -> None:
    # "Step 1: <40 words> Step 2: <the same>...": no exact cycle, but hardly a 16-gram is new.
    ids = [token for step in range(20) for token in (7, 5000 + step, *fresh(40))]
    found = repetition(ids)
    # 40 words and the next "Step" are 41 tokens with 26 16-grams, one less in the last of 19 rounds that are old.
    assert found == Repetition(None, 2, (18 * 26 + 25) / (20 * 42 - 15))
    grams = [tuple(ids[i : i + 16]) for i in range(len(ids) - 15)]
    assert found.share == pytest.approx(1 - len(set(grams)) / len(grams)), "the evaluation's definition"


def test_a_loop_with_a_counter_over_short_rounds_is_a_list() -> None:
    assert repetition([token for step in range(60) for token in (7, 5000 + step, *fresh(10))]) is None


def test_too_short_to_tell() -> None:
    assert repetition([]) is None
    assert repetition([1] * 20) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(1, 30),
    st.lists(st.integers(6, 9), max_size=60),
)
def test_cycles_are_those_of_the_plain_search(
    before: list[int], cycle: list[int], copies: int, after: list[int]
) -> None:
    ids = [*before, *cycle * copies, *after]
    found = repetition(ids)
    assert (found if found is not None and found.period else None) == brute_force(ids)


def test_cycles_in_random_tokens_are_those_of_the_plain_search() -> None:
    rng = random.Random(0)
    some = 0
    for _ in range(300):
        cycle = rng.choices(range(50), k=rng.randint(1, 60))
        ids = rng.choices(range(50), k=rng.randint(0, 100)) + cycle * rng.randint(2, 8)
        ids = ids[: len(ids) - rng.randint(0, len(cycle))]
        found = repetition(ids)
        some += found is not None
        assert (found if found is not None and found.period else None) == brute_force(ids)
    assert 100 < some < 300


@pytest.mark.parametrize("name", PLAIN_TEXTS)
def test_texts_that_repeat_themselves_with_reason_are_no_loops(name: str) -> None:
    ids = words_as_ids(PLAIN_TEXTS[name])
    assert len(ids) >= MIN_TOKENS
    assert repetition(ids) is None


@pytest.mark.parametrize("name", PLAIN_TEXTS)
def test_the_same_texts_over_and_over_are(name: str) -> None:
    found = repetition(words_as_ids((PLAIN_TEXTS[name] + "\n\n") * 4))
    assert found is not None and found.period == len(words_as_ids(PLAIN_TEXTS[name] + "\n\n"))


def test_the_packaged_sample_holds_loops_and_they_are_the_greedy_answers() -> None:
    """Its answers are greedy and sampled in turn; a small model loops when greedy, and hardly ever when sampled."""
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["messages"][-1]["content"] for line in file]
    looping = [repetition(words_as_ids(answer)) is not None for answer in answers]
    assert sum(looping[0::2]) > 100
    assert sum(looping[1::2]) < 25


@pytest.mark.slow
def test_with_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("smollm2-135m-instruct"))
    for name, text in PLAIN_TEXTS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert repetition(ids) is None, name
        assert repetition([*ids, *ids, *ids]) is not None, name
