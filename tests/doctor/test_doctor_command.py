"""`sstf doctor` as a user runs it: what it prints, what it exits with, and what it says of bad input."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from spoilt_heads import alter_tensors, name_layers

from sstf.cli import main
from sstf.doctor import Check, Question, Report, print_report
from sstf.doctor.examine import QUESTIONS
from sstf.pipeline import Run


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_a_run_that_is_whole(finished_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = doctor(capsys, str(finished_config), "--json")
    report = json.loads(out)
    assert code == 0 and report["verdict"] == "pass" and report["fits"] == "fits target: yes"
    assert {check["part"] for check in report["checks"]} == {"head", "target", "data", "features", "training"}
    assert all(check["bound"] for check in report["checks"])
    assert not [check["name"] for check in report["checks"] if check["verdict"] in ("fail", "skipped")]


def test_a_head_of_a_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = doctor(capsys, str(run.config.folder), "--target", run.config.target.name)
    assert code == 0
    asked = len(QUESTIONS) - 1  # it has no mask token
    assert f"{asked} pass, 0 warn, 0 fail, 0 skipped; fits target: yes" in out


def test_a_failed_check_is_exit_code_1(head: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = doctor(capsys, str(name_layers(head, [3, 5, 7])), "--target", run.config.target.name)
    assert code == 1
    assert "fits target: no, because of layer alignment" in out
    assert "how its files count them" in out


def test_stages_that_are_not_done_are_skipped_and_named(
    finished_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = yaml.safe_load(finished_config.read_text(encoding="utf-8"))
    rows = [
        {"messages": [{"role": "user", "content": f"{i} {i * i}?"}, {"role": "assistant", "content": f"Hello {i}"}]}
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields["data"]["source"]["path"] = str(tmp_path / "rows.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(fields | {"output_dir": str(tmp_path / "run")}), encoding="utf-8")
    code, out, _ = doctor(capsys, str(config), "--json", "train.steps=5")
    verdicts = {check["name"]: check["verdict"] for check in json.loads(out)["checks"]}
    assert code == 0
    assert verdicts["trained share"] == "pass"
    assert {verdicts[question.name] for question in QUESTIONS} == {"skipped"}
    assert not (tmp_path / "run").exists()  # nothing is written


def test_features_computed_while_training_and_a_method_without_a_head(
    finished_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, reason in (("extract.online=true", "nothing is stored"), ("method={kind: ngram}", "has no head")):
        _, out, _ = doctor(capsys, str(finished_config), "--json", change)
        measured = {check["name"]: check["measured"] for check in json.loads(out)["checks"]}
        assert reason in measured["states per token"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_no_head_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = doctor(capsys, str(tmp_path))
    assert code == 2 and "no head there" in err


def test_a_pickle_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = doctor(capsys, str(tmp_path), "--target", run.config.target.name)
    assert code == 2 and "a pickle, which can run any code" in err


def test_a_published_head_needs_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = doctor(capsys, str(tmp_path))
    assert code == 2 and "--target NAME" in err


def test_what_is_no_head_of_this_kind_fails(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"fc.weight": torch.zeros(64, 192)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, out, _ = doctor(capsys, str(tmp_path), "--target", run.config.target.name, "--json")
    tensors = next(check for check in json.loads(out)["checks"] if check["name"] == "tensors")
    assert code == 1 and "no head of a kind known here" in tensors["measured"]


@pytest.mark.parametrize("published", [True, False])
def test_damaged_files_are_exit_code_3(
    head: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], published: bool
) -> None:
    file = head / "head.safetensors"
    if published:
        head = tmp_path / "published"
        head.mkdir()
        (head / "config.json").write_text("{}", encoding="utf-8")
        shutil.copy(file, head / "model.safetensors")
        file = head / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    code, _, err = doctor(capsys, str(head), "--target", run.config.target.name)
    assert code == 3 and str(file) in err.replace("\n", "")


def test_options_that_do_not_fit_the_subject(
    finished_config: Path, head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "override target.name" in doctor(capsys, str(finished_config), "--target", "x")[2]
    assert "is none" in doctor(capsys, str(head), "train.steps=5")[2]


def test_a_head_that_is_not_finite_is_not_run(head: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    alter_tensors(head, lambda tensors: tensors["fc.weight"].fill_(float("inf")))
    code, out, _ = doctor(capsys, str(head), "--target", run.config.target.name)
    assert code == 1 and "not measured before finite values is right" in out


# ---- what is printed -------------------------------------------------------------------------------------------------

QUESTION = Question("head", "a [bold] name", "x[i] at most 1", "Do this.")
REPORT = Report(
    "runs/a",
    "b",
    (QUESTION.answer("fail", "x[0] is 2", {"x": 2.0}), QUESTION.answer("pass", "x is 1"), QUESTION.skipped("no x")),
)


@pytest.mark.parametrize("width", [30, 80, 140])
def test_every_width_tells_all(width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    print_report(console, REPORT)
    printed = " ".join(console.export_text().split())
    for part in ("a [bold] name", "x[0] is 2", "x[i] at most 1", "Do this.", "no x", "fits b: no"):
        assert part in printed
    assert all(len(line) <= width for line in _boxed(console.export_text()))


def _boxed(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("│", "┃"))]


def test_advice_goes_with_what_is_not_met_only() -> None:
    advice = {check.verdict: check.advice for check in REPORT.checks}
    assert advice == {"fail": "Do this.", "pass": "", "skipped": ""}


def test_the_report_as_json() -> None:
    fields: dict[str, Any] = json.loads(json.dumps(REPORT.to_json()))
    assert fields["verdict"] == "fail"
    assert fields["checks"][0] == {
        "part": "head",
        "name": "a [bold] name",
        "verdict": "fail",
        "measured": "x[0] is 2",
        "bound": "x[i] at most 1",
        "advice": "Do this.",
        "figures": {"x": 2.0},
    }


def test_a_run_without_a_head_fits_nothing() -> None:
    assert Report("c", "t", (Check("data", "mask", "pass", "", ""),)).fits == ""
