from __future__ import annotations

import json
import random
from io import StringIO

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from sstf.data.lint import CHECKS, Finding, LintReport, lint, print_lint
from sstf.types import TokenSample

VOCABULARY = 300
END, START, OTHER = 2, 1, 0  # <|im_end|>, <|im_start|>, <|endoftext|>


def words(seed: int, count: int = 40) -> list[int]:
    """Ids of letters that no other seed gives."""
    return random.Random(seed).choices(range(60, 90), k=count)


def sample(name: str, answer: list[int], prompt: int = 30) -> TokenSample:
    ids = [START, *words(seed_of(name), prompt), *answer]
    return TokenSample(name, ids, [False] * (prompt + 1) + [True] * len(answer))


def seed_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


def good(count: int, first: int = 0) -> list[TokenSample]:
    return [sample(f"good{i}", [*words(i), END]) for i in range(first, first + count)]


def check(
    tokenizer: PreTrainedTokenizerBase, samples: list[TokenSample], max_length: int = 1000, vocab: int = VOCABULARY
) -> LintReport:
    return lint(samples, ["chats"] * len(samples), tokenizer, max_length, vocab)


def open_findings(report: LintReport) -> dict[str, Finding]:
    return {finding.check: finding for finding in report.findings if finding.verdict != "fine"}


def test_good_data_is_fine_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    report = check(tokenizer, good(20))
    assert report.verdict == "fine"
    [figures] = report.sources
    # 31 tokens of prompt, 40 of answer and its end
    assert (figures.samples, figures.answers, figures.tokens, figures.trained_tokens) == (20, 20, 20 * 72, 20 * 41)
    assert figures.trained_share == 41 / 72
    assert len(report.findings) == len(CHECKS) + 1
    assert all(finding.advice == "" for finding in report.findings)


@pytest.mark.parametrize("trained", [True, False])
def test_a_mask_of_all_or_nothing_is_an_error(tokenizer: PreTrainedTokenizerBase, trained: bool) -> None:
    samples = [TokenSample(s.id, s.input_ids, [trained] * len(s.input_ids)) for s in good(5)]
    report = check(tokenizer, samples)
    assert report.verdict == "error"
    finding = open_findings(report)["trained share"]
    assert (finding.verdict, finding.count, finding.total) == ("error", 5 * 72 * trained, 5 * 72)
    assert "--preview" in finding.advice


def test_the_mask_is_judged_by_source(tokenizer: PreTrainedTokenizerBase) -> None:
    broken = [TokenSample(f"b{i}", words(i + 900, 72), [False] * 72) for i in range(2)]
    report = lint([*good(50), *broken], ["a"] * 50 + ["b"] * 2, tokenizer, 1000, VOCABULARY)
    errors = [(f.source, f.check) for f in report.findings if f.verdict == "error"]
    assert errors == [("b", "trained share"), ("b", "nothing trained")]
    assert [s.source for s in report.sources] == ["a", "b"]


def test_samples_without_trained_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    report = check(tokenizer, [*good(19), sample("empty", [])])
    assert open_findings(report).keys() == {"nothing trained"}
    finding = open_findings(report)["nothing trained"]
    assert (finding.verdict, finding.count, finding.total, finding.examples) == ("warning", 1, 20, ("empty",))


def test_cut_samples_are_counted_and_their_last_answer_is_not_called_unfinished(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    cut = [sample(f"cut{i}", words(500 + i, 50)) for i in range(5)]  # 81 tokens
    report = check(tokenizer, [*good(15), *cut], max_length=81)
    assert open_findings(report).keys() == {"as long as max_length"}
    assert open_findings(report)["as long as max_length"].count == 5
    report = check(tokenizer, [*good(15), *cut], max_length=82)
    assert open_findings(report).keys() == {"answers without an end token"}
    finding = open_findings(report)["answers without an end token"]
    assert (finding.count, finding.total, finding.verdict) == (5, 20, "warning")
    assert finding.examples == ("cut0", "cut1", "cut2")


def test_a_mask_that_stops_before_the_end_token_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [TokenSample(s.id, s.input_ids, [*s.loss_mask[:-1], False]) for s in good(10)]
    assert open_findings(check(tokenizer, samples))["answers without an end token"].verdict == "error"


def test_a_mask_that_runs_into_the_next_turn_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [sample(f"s{i}", [*words(i), END, START, *words(i + 100), END]) for i in range(10)]
    found = open_findings(check(tokenizer, samples))
    assert found.keys() == {"end of a turn inside an answer", "special tokens inside an answer"}
    assert found["end of a turn inside an answer"].verdict == "error"


def test_other_special_tokens_inside(tokenizer: PreTrainedTokenizerBase) -> None:
    found = open_findings(check(tokenizer, [*good(9), sample("odd", [*words(70), START, *words(71), END])]))
    assert found.keys() == {"special tokens inside an answer"}
    assert found["special tokens inside an answer"].examples == ("odd",)
    assert found["special tokens inside an answer"].verdict == "warning"


def test_exact_and_near_duplicates(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = good(40)
    copy = TokenSample("copy", samples[3].input_ids, samples[3].loss_mask)
    nearly = [sample(f"near{i}", [*words(i), words(i + 200)[0], END], prompt=20) for i in range(4)]
    report = check(tokenizer, [*samples, copy, *nearly])
    found = open_findings(report)
    assert found.keys() == {"exact duplicates", "near duplicates of an answer"}
    assert (found["exact duplicates"].count, found["exact duplicates"].examples) == (1, ("copy",))
    assert found["near duplicates of an answer"].count == 4, "the copy is not counted twice"
    twice = [TokenSample(f"again{s.id}", s.input_ids, s.loss_mask) for s in samples]
    assert open_findings(check(tokenizer, [*samples, *twice]))["exact duplicates"].verdict == "error"


def test_short_answers_may_be_alike(tokenizer: PreTrainedTokenizerBase) -> None:
    report = check(tokenizer, [sample(f"yes{i}", [*words(1, 5), END]) for i in range(20)])
    assert report.verdict == "fine"


def test_ids_outside_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [*good(20), sample("high", [*words(300), VOCABULARY, END]), sample("low", [*words(301), -1, END])]
    finding = open_findings(check(tokenizer, samples))["ids outside the vocabulary"]
    assert (finding.verdict, finding.count, finding.examples) == ("error", 2, ("high", "low"))
    assert open_findings(check(tokenizer, samples, vocab=VOCABULARY + 1))["ids outside the vocabulary"].count == 1


def test_unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.unk_token_id == OTHER
    text = TokenSample("text", [START, *words(7), OTHER, *words(8), END], [False] * 42 + [True] * 41)
    found = open_findings(check(tokenizer, [*good(20), text]))
    assert (found["unknown tokens"].count, found["unknown tokens"].verdict) == (1, "warning")
    # Some targets end a text with the token that their tokenizer also has for the unknown.
    assert "unknown tokens" not in open_findings(check(tokenizer, [*good(20), sample("end", [*words(9), OTHER])]))
    tokenizer.pad_token = tokenizer.unk_token
    assert "unknown tokens" not in open_findings(check(tokenizer, [*good(20), text])), "it may be padding"


def test_loops(tokenizer: PreTrainedTokenizerBase) -> None:
    loop = sample("loop", [*words(400), *words(401, 6) * 20, END])
    found = open_findings(check(tokenizer, [*good(20), loop]))
    assert found.keys() == {"answers stuck in a loop"}
    assert found["answers stuck in a loop"].examples == ("loop",)


def test_every_answer_of_a_conversation_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = good(2)
    both = TokenSample("both", one.input_ids + two.input_ids, one.loss_mask + two.loss_mask)
    assert check(tokenizer, [both]).sources[0].answers == 2


def test_nothing_to_check(tokenizer: PreTrainedTokenizerBase) -> None:
    assert check(tokenizer, []) == LintReport((), ())
    with pytest.raises(ValueError, match="zip"):
        lint(good(2), ["a"], tokenizer, 10, VOCABULARY)


def test_as_json_and_as_tables(tokenizer: PreTrainedTokenizerBase) -> None:
    report = lint([*good(19), sample("[b]odd\x1b", [])], ["[red]a"] * 20, tokenizer, 1000, VOCABULARY)
    value = json.loads(json.dumps(report.to_json()))
    assert value["verdict"] == "warning"
    assert value["sources"][0]["samples"] == 20
    assert [f["check"] for f in value["findings"] if f["verdict"] != "fine"] == ["nothing trained"]
    out = StringIO()
    print_lint(Console(file=out, width=200, no_color=True), report)
    text = out.getvalue()
    assert "1 of 20 samples" in text and "5.0%" in text and "Raise max_length above the prompts" in text
    assert "[red]a" in text and "[b]odd‹U+001B›" in text, "names are text, not markup or commands"
    assert f"{len(CHECKS)} of {len(CHECKS) + 1} checks are fine." in text
