"""`sstf eval CONFIG --against REPORT` and `sstf tune CONFIG` on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipeline_runs import open_run

from sstf.cli import main


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_a_report_against_itself(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_run(finished).folder("eval")
    assert ended("eval", str(finished), "--against", str(folder)) == 0
    text = (folder / "against.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| arm")]
    assert len(rows) == 3 * 2 * 2, "ngram, chain and tree at two temperatures, two figures"
    assert all("+0.000 (+0.000 to +0.000)" in row and "no clear difference" in row for row in rows)
    assert "against.md" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [(None, 2, "cannot be read"), ("{", 3, "not valid JSON"), ('{"rows": []}', 2, "older version")],
)
def test_a_report_that_cannot_be_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, code: int, expected: str
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert ended("eval", str(finished), "--against", str(tmp_path)) == code
    found = capsys.readouterr().err
    assert expected in found.replace("\n", " ") and "Traceback" not in found


def test_tuning_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"prompt": "tea?"}\n')
    settings = [f"suite={suite}", "max_new_tokens=12", "batches=[1,2]", "contexts=[16]", "repeats=1"]
    code = ended("tune", str(finished), *settings, "--out", str(tmp_path / "tuned"))
    content = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    pays = max(content["break_even"].values()) > 0
    assert code == (0 if pays else 1)
    assert [(one["batch"], one["context"]) for one in content["chains"]] == [(1, 16), (2, 16)]
    out = capsys.readouterr().out
    assert all(line in out for line in content["launch"]), "they can be copied whole"
    assert (tmp_path / "tuned" / "tune.svg").is_file()


def test_a_published_copy_is_compared_too(finished: Path, tmp_path: Path) -> None:
    """`evaluation.json` of a published head is the report with more fields."""
    report = json.loads((open_run(finished).folder("eval") / "report.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(report | {"seed": 0, "suite_sha256": "x"}))
    assert ended("eval", str(finished), "--against", str(tmp_path / "evaluation.json")) == 0
