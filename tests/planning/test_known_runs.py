from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sstf.methods import METHODS
from sstf.planning.known_runs import KnownRun, expected, known_runs, reached, tier_of, tokens_of

ROW = KnownRun("a", 1_000_000, "eagle3", 100, 10_000, "chain", 3, 0.0, "suite", 1.2, "ours", "a command")
TABLE = [
    ROW,
    replace(ROW, tokens=40_000, accepted_length=1.6, target="b"),
    replace(ROW, tokens=40_000, accepted_length=1.4),
    replace(ROW, tokens=20_000, accepted_length=9.0, shape="tree"),
    replace(ROW, tokens=20_000, accepted_length=9.0, method="other"),
    replace(ROW, tokens=20_000, accepted_length=9.0, parameters=50_000_000),
    replace(ROW, tokens=20_000_000, accepted_length=9.0),
]


def test_between_two_amounts_of_data_on_a_logarithmic_scale() -> None:
    found = expected(TABLE, "eagle3", "chain", 2_000_000, 20_000)
    assert found is not None
    # Half way from 10,000 to 40,000 in the logarithm; 1.5 is the median of the two at 40,000.
    assert found.value == pytest.approx((1.2 + 1.5) / 2)
    assert (found.low, found.high, found.runs, found.targets) == (1.2, 1.6, 3, ("a", "b"))
    assert not found.outside


def test_beyond_the_runs_the_nearest_holds_and_the_plan_says_so() -> None:
    less, more = (expected(TABLE, "eagle3", "chain", 1_000_000, t) for t in (4_500, 90_000))
    assert less is not None and more is not None
    assert (less.value, less.outside) == (1.2, True)
    assert (more.value, more.outside) == (1.5, True)


@pytest.mark.parametrize(
    ("method", "shape", "parameters", "tokens"),
    [
        ("ngram", "chain", 1_000_000, 20_000),
        ("eagle3", "chain", 1_000_000_000, 20_000),
        ("eagle3", "chain", 1_000_000, 1_000_000),
        ("eagle3", "chain", 1_000_000, 500),
    ],
)
def test_no_comparable_run_is_no_figure(method: str, shape: str, parameters: int, tokens: float) -> None:
    assert expected(TABLE, method, shape, parameters, tokens) is None  # type: ignore[arg-type]


def test_tokens_are_estimated_where_only_conversations_are_known() -> None:
    assert tokens_of(ROW) == 10_000
    assert tokens_of(replace(ROW, tokens=None)) == 100 * 1316


def test_the_table_is_whole() -> None:
    runs = known_runs()
    assert len(runs) >= 15
    for run in runs:
        assert run.source and run.suite and 1 <= run.accepted_length < 20
        assert run.shape in ("chain", "tree") and run.origin in ("ours", "reported", "published")
        # A pass emits its drafts and one more.
        assert run.depth is None or run.accepted_length <= run.depth + 1
        if run.origin == "ours":
            assert run.method in METHODS and run.tokens is not None


def test_every_tier_was_reached_by_some_run_and_more_data_by_better_heads() -> None:
    spans = [reached(known_runs(), tier) for tier in ("smoke", "dev", "prod")]
    assert [tier_of(t) for t in (1, 2.9e6, 3e6, 9e7, 1e8, math.inf)] == ["smoke"] * 2 + ["dev"] * 2 + ["prod"] * 2
    assert [low for low, _ in spans] == sorted(low for low, _ in spans)
    assert [high for _, high in spans] == sorted(high for _, high in spans)


def test_the_demo_is_expected_to_do_what_it_did() -> None:
    """docs/benchmarks.md: 1.25 with a chain of 2, 1.47 with a tree, after 122,910 tokens."""
    for shape, measured in (("chain", 1.25), ("tree", 1.47)):
        found = expected(known_runs(), "eagle3", shape, 134_515_008, 122_910)  # type: ignore[arg-type]
        assert found is not None and found.low <= measured <= found.high
        assert found.value == pytest.approx(measured, abs=0.02)
