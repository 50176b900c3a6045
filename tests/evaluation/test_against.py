"""Paired comparisons by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sstf.errors import DamagedDataError, DataError
from sstf.evaluation.against import compare, markdown, read_report
from sstf.evaluation.metrics import sign_test


def report(*passes: int, arm: str = "chain", seconds: float = 1.0) -> dict[str, Any]:
    """12 tokens a prompt in so many passes, against 12 plain passes in 2 s."""
    prompts = []
    for number, count in enumerate(passes):
        common = {"temperature": 0.0, "prompt": str(number), "prompt_tokens": 9, "tokens": 12}
        prompts.append(common | {"arm": "plain", "passes": 12, "decode_s": 2.0})
        prompts.append(common | {"arm": arm, "passes": count, "decode_s": seconds})
    return {
        "target": {"fingerprint": "f", "name": "t"},
        "eval": {"max_new_tokens": 13, "top_p": 1.0},
        "head": "h",
        "hardware": {"gpu": None},
        "rows": [],
        "prompts": prompts,
    }


def test_differences_by_hand() -> None:
    """Every prompt gains: from 12/6 = 2 tokens a pass to 3 or 4."""
    length, speedup = compare(report(*[6] * 6), report(*[4] * 5, 3, seconds=0.5))
    assert (length.figure, length.prompts, length.old) == ("accepted_length", 6, 2.0)
    assert length.new == pytest.approx(19 / 6) and length.difference == pytest.approx(7 / 6)
    assert length.difference_ci[0] >= 1.0 and length.difference_ci[1] <= 2.0
    assert (length.better, length.worse, length.p_value) == (6, 0, 2 / 64)
    assert length.verdict == "better"
    # 12 / 1 over 12 / 2, and 12 / 0.5 over 12 / 2
    assert (speedup.old, speedup.new, speedup.difference_ci) == (2.0, 4.0, (2.0, 2.0))


def test_no_clear_difference_and_worse() -> None:
    length, _ = compare(report(6, 4, 6, 4), report(4, 6, 6, 4))
    assert (length.better, length.worse, length.p_value) == (1, 1, 1.0)
    assert length.difference == 0.0 and length.verdict == "no clear difference"
    length, _ = compare(report(*[3] * 6), report(*[6] * 6))
    assert length.verdict == "worse"
    # an interval above 0 with too few prompts to tell
    assert compare(report(6, 6), report(4, 4))[0].verdict == "no clear difference"


def test_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(1, 0) == 1.0
    assert sign_test(6, 1) == pytest.approx(2 * (1 + 7) / 128)
    assert sign_test(1, 6) == sign_test(6, 1)
    assert sign_test(4, 4) == 1.0


def test_a_text_without_a_pass_is_left_out() -> None:
    new = report(4, 4)
    new["prompts"][1] |= {"tokens": 0, "passes": 0}
    assert compare(report(6, 6), new)[0].prompts == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("target", "fingerprint", "g"), "different targets"),
        (("eval", "max_new_tokens", 14), "eval.max_new_tokens=14 and 13"),
        (("prompts", 0, {}), "different prompts"),
    ],
)
def test_what_cannot_be_compared(change: tuple[Any, Any, Any], expected: str) -> None:
    old = report(6)
    if change[0] == "prompts":
        old = report(6, 6)
    else:
        old[change[0]][change[1]] = change[2]
    with pytest.raises(DataError, match=expected):
        compare(old, report(4))


def test_no_common_arm() -> None:
    with pytest.raises(DataError, match="no arm and temperature is in both reports; the old one has plain, tree"):
        compare(report(6, arm="tree"), report(4))


def test_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        read_report(tmp_path)
    file = tmp_path / "report.json"
    file.write_text("{")
    with pytest.raises(DamagedDataError, match="not valid JSON"):
        read_report(file)
    file.write_text('{"rows": [], "schema": 1}')
    with pytest.raises(DataError, match="of an older version, without figures by prompt"):
        read_report(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="not a report of"):
        read_report(file)
    file.write_text(json.dumps(report(6)))
    assert read_report(tmp_path) == report(6)


def test_the_table() -> None:
    old, new = report(*[6] * 6), report(*[4] * 6)
    text = markdown(compare(old, new), old, new)
    assert "| chain | 0 | accepted length | 2.000 | 3.000 | +1.000 (+1.000 to +1.000) | 6 / 0 of 6 |" in text
    assert "different machines" not in text
    other = copy.deepcopy(new) | {"hardware": {"gpu": "H"}}
    assert "different machines" in markdown(compare(old, other), old, other)
