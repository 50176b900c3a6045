"""The protocol on the tiny target, the void rules, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sstf.data.progress import NoProgress
from sstf.errors import DataError
from sstf.evaluation import EvalConfig, Row, compare_heads, evaluate, measure
from sstf.evaluation.metrics import Record
from sstf.evaluation.run import _row, _summarise, _void
from sstf.methods import Eagle3Config, NgramConfig, SuffixConfig, TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, DynamicTree


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    prompts = [("Hi", "a"), ("Hello user", "b"), ("moon moon moon moon", "a"), ("tea?", "b")]
    path.write_text("".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in prompts))
    return str(path)


@pytest.fixture(scope="module")
def head(tiny_target: Target) -> DraftHead:
    """Untrained: a rough early exit of the target, so that some drafts are accepted and most are not."""
    method = build_method(Eagle3Config(draft_vocab_size=300))
    assert isinstance(method, TrainableMethod)
    torch.manual_seed(0)
    module = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    return DraftHead("untrained", method, module.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def rows(tiny_target: Target, head: DraftHead, suite: str) -> list[Row]:
    config = EvalConfig(
        suite=suite,
        max_new_tokens=24,
        repeats=2,
        temperatures=(0.0, 1.0),
        policies={"chain": Chain(depth=2), "tree": DynamicTree(depth=3, top_k=3, total_tokens=8)},
    )
    return evaluate(tiny_target, head, config, NoProgress(), seed=1)


def test_a_repeat_does_not_find_its_own_earlier_answer(tiny_target: Target, suite: str) -> None:
    """Suffix lookup remembers answers; what it gains by those of other prompts counts, the repeat's own would not."""
    head = DraftHead("suffix", build_method(SuffixConfig()))
    lengths = []
    for repeats in (1, 3):
        config = EvalConfig(
            suite=suite, max_new_tokens=24, repeats=repeats, temperatures=(0.0,), policies={"mine": Chain(depth=8)}
        )
        found = measure(tiny_target, head, config, NoProgress())
        lengths.append(next(r.accepted_length for r in found.rows if (r.arm, r.category) == ("mine", "all")))
    assert lengths[0] == pytest.approx(lengths[1]) and lengths[0] > 1
    assert any(limits.arm == "mine" for limits in found.limits)


def test_every_arm_at_every_temperature_in_every_category(rows: list[Row]) -> None:
    assert [(r.temperature, r.arm, r.category) for r in rows] == [
        (temperature, arm, category)
        for temperature in (0.0, 1.0)
        for arm in ("plain", "ngram", "chain", "tree")
        for category in ("all", "a", "b")
    ]
    assert {r.prompts for r in rows if r.category == "all"} == {4}
    assert {r.prompts for r in rows if r.category != "all"} == {2}


def test_heads_side_by_side(tiny_target: Target, head: DraftHead, suite: str, rows: list[Row]) -> None:
    """As each alone; lookup drafts chains only."""
    config = EvalConfig(
        suite=suite,
        max_new_tokens=24,
        repeats=2,
        temperatures=(0.0,),
        ngram_depth=2,
        policies={"chain": Chain(depth=2), "tree": DynamicTree(depth=3, top_k=3, total_tokens=8)},
    )
    heads = {"one": head, "lookup": DraftHead("lookup", build_method(NgramConfig())), "two": head}
    found = {r.arm: r for r in compare_heads(tiny_target, heads, config, NoProgress(), seed=1) if r.category == "all"}
    assert list(found) == ["plain", "ngram", "one: chain", "one: tree", "lookup: chain", "two: chain", "two: tree"]
    alone = {r.arm: r for r in rows if r.temperature == 0 and r.category == "all"}
    for policy in ("chain", "tree"):
        assert found[f"one: {policy}"].survival == found[f"two: {policy}"].survival == alone[policy].survival
    assert found["lookup: chain"].survival == found["ngram"].survival


def test_greedy_speculation_says_what_plain_decoding_says(rows: list[Row]) -> None:
    assert {r.identical for r in rows if r.temperature == 0} == {1.0}
    assert {r.identical for r in rows if r.temperature == 1} == {None}


def test_plain_decoding_is_the_unit(rows: list[Row]) -> None:
    for r in rows:
        if r.arm == "plain":
            assert (r.accepted_length, r.accepted_length_ci) == (1.0, (1.0, 1.0))
            assert (r.speedup, r.speedup_ci, r.void) == (1.0, (1.0, 1.0), None)
            assert (r.survival, r.acceptance_rate) == ([], []) and r.draft_ms < r.verify_ms


def test_figures_are_consistent(rows: list[Row]) -> None:
    depths = {"plain": 0, "ngram": 4, "chain": 2, "tree": 3}
    for r in rows:
        assert len(r.survival) == len(r.acceptance_rate) == depths[r.arm]
        assert r.survival == sorted(r.survival, reverse=True)
        assert r.accepted_length == pytest.approx(1 + sum(r.survival))
        assert 1 <= r.accepted_length <= depths[r.arm] + 1
        assert r.accepted_length_ci[0] <= r.accepted_length <= r.accepted_length_ci[1]
        assert r.speedup_ci[0] <= r.speedup <= r.speedup_ci[1]
        assert r.tokens_per_second > 0 and r.verify_ms > 0


def test_the_categories_are_parts_of_the_whole(rows: list[Row]) -> None:
    for arm in ("ngram", "chain", "tree"):
        whole, a, b = [r for r in rows if r.arm == arm and r.temperature == 0]
        assert min(a.accepted_length, b.accepted_length) <= whole.accepted_length
        assert whole.accepted_length <= max(a.accepted_length, b.accepted_length)


def test_token_counts_equal_the_plain_arms(
    tiny_target: Target, head: DraftHead, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records behind the figures: same tokens, and accepted lengths that sum to all but the first of them."""
    seen: dict[str, list[Record]] = {}

    def keep(records: dict[str, list[Record]], *rest: object, **named: object) -> list[Row]:
        seen.update(records)
        return []

    monkeypatch.setattr("sstf.evaluation.run._summarise", keep)
    evaluate(
        tiny_target, head, EvalConfig(suite=suite, max_new_tokens=20, repeats=1, temperatures=(0.0,)), NoProgress()
    )
    assert list(seen) == ["plain", "ngram", "chain", "tree"]
    for records in seen.values():
        assert [r.token_ids for r in records] == [r.token_ids for r in seen["plain"]]
        assert [r.decoded for r in records] == [len(r.token_ids) - 1 for r in records]
    assert sum(len(r.accepted_lengths) for r in seen["chain"]) < sum(len(r.accepted_lengths) for r in seen["plain"])


def test_without_a_head_only_the_baselines(tiny_target: Target, suite: str) -> None:
    rows = evaluate(
        tiny_target,
        None,
        EvalConfig(suite=suite, max_new_tokens=3, repeats=1, temperatures=(0.0,), prompts=1),
        NoProgress(),
    )
    assert [(r.arm, r.category) for r in rows] == [
        ("plain", "all"), ("plain", "a"), ("ngram", "all"), ("ngram", "a"),
    ]  # fmt: skip


def test_a_method_without_a_module_is_measured_with_its_own_settings(tiny_target: Target, suite: str) -> None:
    """n-grams of 200 tokens never repeat here, so nothing is drafted; that is no broken head."""
    lookup = DraftHead("ngram", build_method(NgramConfig(min_n=200, max_n=200)))
    config = EvalConfig(
        suite=suite, max_new_tokens=8, repeats=1, temperatures=(0.0,), policies={"mine": Chain(depth=2)}
    )
    mine = next(r for r in evaluate(tiny_target, lookup, config, NoProgress()) if r.arm == "mine")
    assert mine.accepted_length == 1.0
    assert not (mine.void or "").startswith("broken")


def test_prompts_without_a_category_are_not_counted_twice(tiny_target: Target, tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": "Hello"}\n')
    rows = evaluate(
        tiny_target, None, EvalConfig(suite=str(path), max_new_tokens=3, repeats=1, temperatures=(0.0,)), NoProgress()
    )
    assert [(r.arm, r.category, r.prompts) for r in rows] == [("plain", "all", 2), ("ngram", "all", 2)]


def test_a_prompt_beyond_the_context_is_refused(tiny_target: Target, suite: str) -> None:
    with pytest.raises(DataError, match=r"need \d+ tokens, the target's context has 256; lower eval\.max_new_tokens"):
        evaluate(tiny_target, None, EvalConfig(suite=suite, max_new_tokens=250), NoProgress())


# ---- rows by hand ----------------------------------------------------------------------------------------------------


def made(prompt: str, lengths: list[int], seconds: float, category: str = "a") -> Record:
    return Record(prompt, category, lengths, list(range(sum(lengths) + 1)), seconds, 0.1, 0.3)


def test_a_row_by_hand() -> None:
    plain = [made("x", [1] * 6, 3.0), made("y", [1] * 4, 2.0)]  # 10 tokens in 5 s
    fast = [made("x", [3, 3], 1.0), made("y", [2, 2], 1.0)]  # 10 tokens in 4 passes and 2 s
    row = _row("chain", 0.0, "all", fast, plain, depth=2)
    assert row.accepted_length == 2.5
    assert row.survival == [1.0, 0.5] and row.acceptance_rate == [1.0, 0.5]
    assert row.tokens_per_second == 5.0
    assert row.speedup == 2.5  # 5 / 2
    assert row.speedup_ci == (2.0, 3.0)  # y alone 4/s over 2/s, x alone 6/s over 2/s
    assert row.accepted_length_ci == (2.0, 3.0)
    assert row.draft_ms == pytest.approx(1e3 * 0.2 / 4) and row.verify_ms == pytest.approx(1e3 * 0.6 / 4)
    assert row.identical == 1.0 and row.prompts == 2


def test_repeats_of_a_prompt_are_drawn_together() -> None:
    """Two repeats of one prompt are one prompt: the interval of a single prompt is a point."""
    plain = [made("x", [1, 1], 1.0), made("x", [1, 1], 2.0)]
    fast = [made("x", [2], 0.5), made("x", [2], 0.5)]
    row = _row("chain", 0.0, "all", fast, plain, depth=1)
    assert row.prompts == 1
    assert row.speedup_ci == (row.speedup, row.speedup)


def test_other_words_are_counted() -> None:
    plain = [made("x", [1, 1], 1.0), made("y", [1, 1], 1.0)]
    other = [made("x", [2], 0.6), replace(made("y", [2], 0.6), token_ids=[9, 9, 9])]
    assert _row("chain", 0.0, "all", other, plain, 1).identical == 0.5


def test_void_rules() -> None:
    plain = [made("x", [1, 1, 1], 1.0)]
    row = replace(_row("chain", 0.0, "all", [made("x", [3], 0.5)], plain, 2), speedup=2.0, repetition=0.1)
    assert _void(row, has_head=True) is None
    assert _void(replace(row, speedup=3.05), has_head=True) is None  # within the clock's 2 %
    assert str(_void(replace(row, speedup=3.1), has_head=True)).startswith("impossible: speedup 3.10 above")
    assert str(_void(replace(row, repetition=0.51), has_head=True)).startswith("repetitive: 51% of 4-grams")
    weak = replace(row, accepted_length=1.04, speedup=0.9)
    assert str(_void(weak, has_head=True)).startswith("broken: accepted length 1.04")
    assert _void(weak, has_head=False) is None
    assert str(_void(replace(row, accepted_length=0.0), has_head=False)).startswith("empty:")


def test_the_plain_row_is_never_void() -> None:
    loop = replace(made("x", [1] * 20, 1.0, "all"), token_ids=[7] * 21)
    rows = _summarise({"plain": [loop], "chain": [loop]}, ["all"], 0.0, {"plain": 0, "chain": 1}, trained={"chain"})
    assert [(r.arm, (r.void or "")[:10]) for r in rows] == [("plain", ""), ("chain", "repetitive")]
