"""A card's figures, measured again: the same on the same machine, and judged by the card's interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError, DataError, HeadError
from sstf.machine import hardware
from sstf.publish.record import read_record
from sstf.publish.reproduce import Drift, drifts, protocol, reproduce

MACHINE = {key: "x" for key in ("machine", "processor", "cores", "threads", "gpu", "gpus", "torch")}


def row(**changes: Any) -> dict[str, Any]:
    fields = {
        "arm": "chain",
        "temperature": 0.0,
        "category": "all",
        "accepted_length": 2.5,
        "accepted_length_ci": [2.25, 2.75],
        "speedup": 1.5,
        "speedup_ci": [1.25, 1.75],
        "void": None,
    }
    return fields | changes


def card(*rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    return {"hardware": MACHINE | machine, "rows": list(rows)}


def verdicts(found: list[Drift]) -> dict[str, bool | None]:
    return {drift.figure: drift.within for drift in found}


def test_the_same_figures_are_within() -> None:
    found = drifts(card(row()), [row()], MACHINE)
    assert verdicts(found) == {"accepted_length": True, "speedup": True}
    assert [drift.change for drift in found] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("now", "within"), [(2.25, True), (2.75, True), (2.2499, False), (2.7501, False), (1.0, False)]
)
def test_accepted_length_by_the_cards_interval(now: float, within: bool) -> None:
    found = drifts(card(row()), [row(accepted_length=now)], MACHINE)
    assert verdicts(found)["accepted_length"] is within
    assert found[0].change == pytest.approx(now / 2.5 - 1)


@pytest.mark.parametrize(
    ("interval", "within"), [((1.75, 2.0), True), ((1.76, 2.0), False), ((0.9, 1.25), True), ((0.9, 1.24), False)]
)
def test_a_speedup_by_both_intervals(interval: tuple[float, float], within: bool) -> None:
    assert verdicts(drifts(card(row()), [row(speedup_ci=interval)], MACHINE))["speedup"] is within


def test_a_speedup_of_other_hardware_is_not_judged() -> None:
    found = drifts(card(row(), processor="other"), [row(speedup=0.5, speedup_ci=(0.4, 0.6))], MACHINE)
    assert verdicts(found) == {"accepted_length": True, "speedup": None}


@pytest.mark.parametrize(("told", "now"), [("x", None), (None, "x")])
def test_a_void_row_has_no_speedup(told: str | None, now: str | None) -> None:
    found = drifts(card(row(void=told)), [row(void=now)], MACHINE)
    assert verdicts(found) == {"accepted_length": True, "speedup": None}


def test_what_is_compared() -> None:
    """Not the plain target, not a row without a pass, not a category; each temperature by itself."""
    told = [row(), row(temperature=1.0), row(arm="plain"), row(arm="tree", accepted_length=0.0), row(category="maths")]
    found = drifts(card(*told), [row(), row(temperature=1.0, accepted_length=9.0)], MACHINE)
    lengths = [(drift.temperature, drift.within) for drift in found if drift.figure == "accepted_length"]
    assert lengths == [(0.0, True), (1.0, False)]
    with pytest.raises(HeadError, match="nothing to compare with"):
        drifts(card(row(arm="plain")), [row()], MACHINE)


# ---- a whole card ----------------------------------------------------------------------------------------------------


def test_greedy_acceptance_is_the_same_again(head: Path) -> None:
    """Exactly: the same prompts, machine and arithmetic."""
    found = reproduce(head, None, None, NoProgress())
    lengths = [drift for drift in found if drift.figure == "accepted_length"]
    assert max(drift.now for drift in lengths if drift.arm == "chain") > 1.05, "the head drafts something"
    assert {drift.arm for drift in lengths} == {"ngram", "chain"}
    assert all(drift.within and drift.now == drift.card for drift in lengths)


def test_of_a_published_folder(folder: Path, run_config: Path, tiny_target_folder: Path) -> None:
    """Neither the target nor the suite is where it was: both are named, and their content is checked."""
    suite = run_config.parent / "suite.jsonl"
    with pytest.raises(DataError, match=r"suite is a file, suite.jsonl; say where it is with --suite"):
        reproduce(folder, str(tiny_target_folder), None, NoProgress())
    found = reproduce(folder, str(tiny_target_folder), suite, NoProgress())
    assert all(drift.now == drift.card for drift in found if drift.figure == "accepted_length")


def test_a_card_that_tells_too_much_is_found_out(folder: Path, run_config: Path, tiny_target_folder: Path) -> None:
    path = folder / "evaluation.json"
    report = json.loads(path.read_text())
    for one in report["rows"]:
        if one["arm"] == "chain":
            one["accepted_length"], one["accepted_length_ci"] = 2.9, [2.8, 3.0]
    report["hardware"]["processor"] = "another"
    path.write_text(json.dumps(report))
    found = reproduce(folder, str(tiny_target_folder), run_config.parent / "suite.jsonl", NoProgress())
    assert {drift.arm for drift in found if drift.within is False} == {"chain"}


def test_other_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "hello?"}\n')
    with pytest.raises(DataError, match="its prompts are not those that the card was measured with"):
        protocol(read_record(folder), folder, other)


def test_without_an_evaluation(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    with pytest.raises(HeadError, match="no evaluation is recorded"):
        protocol(read_record(folder), folder, None)


def test_settings_of_another_version(folder: Path, run_config: Path) -> None:
    record = read_record(folder)
    assert record.evaluation is not None
    record.evaluation["eval"]["batch"] = 3
    with pytest.raises(DamagedDataError, match="settings that this version does not know"):
        protocol(record, folder, run_config.parent / "suite.jsonl")


def test_hardware_has_what_makes_two_machines_one() -> None:
    assert set(MACHINE) <= set(hardware())
