from __future__ import annotations

import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.data.conversations import SAMPLE
from sstf.data.decontamination import DecontaminationReport, Decontaminator, Match

BUILTIN = SAMPLE.parents[2] / "evaluation" / "suites" / "builtin.jsonl"  # read as a file: data is the lower layer

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."  # 19 words
MIDDLE = "How many legs do seven healthy spiders have together?"  # 9 words
SHORT = "What is the capital of France?"  # 6 words


def test_thirteen_words_in_a_row() -> None:
    suites = Decontaminator(
        {"maths": ["Something else entirely that is long enough to have its own words in here.", LONG]}
    )
    inside = "Please solve: of her friends in April AND THEN she -- sold half as many clips! Bye"  # 13 words of it
    assert suites.match(inside) == Match("maths", 1, "of her friends in april and then she sold half as many clips")
    assert suites.match(inside.replace("many clips", "many books")) is None, "12 words"
    assert suites.match(LONG.upper()) == Match("maths", 1, " ".join(LONG.lower().replace(",", "").strip(".").split()))


def test_a_prompt_of_eight_to_twelve_words_counts_whole() -> None:
    suites = Decontaminator({"riddles": [MIDDLE]})
    assert suites.match(f"Here is one for you. {MIDDLE} Think first.") == Match(
        "riddles", 0, "how many legs do seven healthy spiders have together"
    )
    assert suites.match("How many legs do seven healthy spiders have?") is None


def test_a_short_prompt_counts_only_alone() -> None:
    suites = Decontaminator({"trivia": [SHORT]})
    assert suites.match("what is the capital of france") == Match("trivia", 0, "what is the capital of france")
    assert suites.match(f"In a quiz I was asked: {SHORT} I said Paris.") is None


def test_an_instruction_that_many_prompts_share_is_not_content() -> None:
    instruction = "Solve the following problem step by step and put the final answer within a box:"  # 15 words
    question = "what is {0} plus {0} times seven minus the root of {0}?"
    suites = Decontaminator({"maths": [f"{instruction} {question.format(i)}" for i in range(11)]})
    assert suites.match(f"{instruction} how much do three apples cost?") is None
    found = suites.match(f"{instruction} {question.format(4)}")
    assert found is not None and found.prompt == 4
    # Ten may share a story; all of them are looked for.
    assert Decontaminator({"maths": [f"{instruction} {i}" for i in range(10)]}).match(instruction) is not None


def test_chinese_counts_by_characters() -> None:
    prompt = "请用三句话解释为什么天空在白天是蓝色的。"  # 18 characters besides the full stop
    suites = Decontaminator({"builtin": [prompt]})
    found = suites.match(f"你好！{prompt}谢谢")
    assert found is not None and found.words == " ".join(prompt[:13])
    assert suites.match("为什么天空在白天是蓝色的？") is None, "12 characters"


def test_prompts_without_words_and_empty_texts() -> None:
    suites = Decontaminator({"odd": ["", "?!", SHORT]})
    assert suites.match("") is None
    assert suites.match("...") is None
    assert Decontaminator({}).match(LONG) is None


def test_too_small_an_n_is_refused() -> None:
    with pytest.raises(ValueError, match="n is 5, expected at least 8"):
        Decontaminator({}, n=5)


def test_any_message_of_a_conversation() -> None:
    suites = Decontaminator({"a": [LONG], "b": [MIDDLE]})
    assert suites.match_any(["Hello there", MIDDLE, LONG]) == suites.match(MIDDLE)
    assert suites.match_any(["Hello there"]) is None


def test_the_report_counts_by_suite_and_lists_the_first_ids() -> None:
    suites = Decontaminator({"a": [LONG], "b": [MIDDLE]})
    report = DecontaminationReport()
    for i in range(7):
        report.add(f"row:{i}", suites.match(LONG))
    report.add("row:7", suites.match(MIDDLE))
    report.add("row:8", suites.match("clean"))
    assert report == DecontaminationReport(
        checked=9,
        matched={"a": 7, "b": 1},
        examples={"a": ["row:0", "row:1", "row:2", "row:3", "row:4"], "b": ["row:7"]},
    )


LETTERS = st.lists(st.sampled_from("abc"), max_size=40)


@given(st.lists(LETTERS, max_size=4), LETTERS)
def test_against_the_plain_search(prompts: list[list[str]], text: list[str]) -> None:
    def contaminated(prompt: list[str]) -> bool:
        if prompt and prompt == text:
            return True
        length = min(13, len(prompt))
        parts = [prompt[i : i + length] for i in range(len(prompt) - length + 1)] if length >= 8 else []
        return any(text[i : i + length] in parts for i in range(len(text) - length + 1))

    found = Decontaminator({"s": [" ".join(p) for p in prompts]}).match(" ".join(text))
    assert (found is not None) == any(map(contaminated, prompts))
    if found is not None:
        assert contaminated(prompts[found.prompt])
        assert found.words in " ".join(prompts[found.prompt])
        assert found.words in " ".join(text)


def test_the_builtin_suite_is_found_in_itself_and_not_in_the_packaged_sample() -> None:
    prompts = [json.loads(line)["prompt"] for line in BUILTIN.read_text(encoding="utf-8").splitlines()]
    suites = Decontaminator({"builtin": prompts})
    rng = random.Random(0)
    for index, prompt in enumerate(prompts):
        found = suites.match(prompt)
        assert found is not None and found.prompt == index
        if len(prompt.split()) >= 13:
            assert suites.match(f"{rng.random()} {prompt} {rng.random()}") is not None
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        texts = [message["content"] for line in file for message in json.loads(line)["messages"]]
    assert [text for text in texts if suites.match(text)] == []
