"""The command line itself: help, exit codes, and what is printed at the end."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from pipeline_runs import WriteConfig, open_run
from rich.console import Console

import sstf
from sstf.cli import COMMANDS, guarded, main
from sstf.errors import ConfigError, DamagedDataError
from sstf.evaluation import EvalConfig
from sstf.progress_display import BarProgress, LogProgress, display

HEAVY = ("torch", "transformers", "numpy", "datasets", "pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sstf.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules], 'slow imports'"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "sstf" in ended.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert (
        f"example: sstf {command} configs/smollm2-135m-instruct/demo.yaml train.optimizer.learning_rate=3e-4" in words
    )


def test_the_example_exists() -> None:
    assert (Path(__file__).parents[2] / "configs/smollm2-135m-instruct/demo.yaml").is_file()


@pytest.mark.parametrize("arguments", [[], ["fly", "x.yaml"], ["run"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: sstf" in capsys.readouterr().err


def test_the_public_names_are_there() -> None:
    for name in sstf.__all__:
        assert getattr(sstf, name).__name__ == name
    assert dir(sstf) == sorted(sstf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode_head'"):
        sstf.lode_head  # noqa: B018


def test_a_finished_run_prints_its_results_at_once(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(finished)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    run = open_run(finished)
    for arm in ("plain", "ngram", "chain", "tree"):
        assert any(arm in line for line in out.splitlines())
    # Paths stay whole however narrow the terminal is, so that they can be copied.
    lines = out.splitlines()
    assert f"head           {run.folder('train') / 'head'}" in lines
    assert f"report         {run.folder('eval') / 'report.md'}" in lines
    assert sum(line.startswith(("conversations", "features", "training log", "for engines")) for line in lines) == 4


def test_a_run_without_training_prints_its_results(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(write_config(method={"kind": "ngram"}, eval__policies=None)), "eval.max_new_tokens=3"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "ngram" in out and "report" in out and "head " not in out
    assert list(EvalConfig().policies) == ["chain", "tree"]


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ConfigError("a [b] :car:"), 2, "error: a [b] :car:\n"),
        (DamagedDataError("c"), 3, "error: c\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
        (OSError(28, "No space left on device"), 2, "error: the disk is full; free some space"),
        (OSError(122, "Disk quota exceeded"), 2, "error: the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: no permission to use /x; choose another"),
    ],
)
def test_errors_become_codes_and_sentences(error: BaseException, code: int, expected: str) -> None:
    def work() -> None:
        raise error

    out = StringIO()
    assert guarded(Console(file=out, width=40), work) == code
    assert out.getvalue().startswith(expected)


def test_an_error_of_ours_keeps_its_traceback() -> None:
    """What a user cannot have caused must not be dressed up as their mistake."""

    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(Console(file=StringIO()), work)


# ---- progress --------------------------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal() -> None:
    out = StringIO()
    progress = display(Console(file=out))
    assert isinstance(progress, LogProgress)
    with progress.start("reading [x]", 3, "rows") as task:
        task.advance(2)
    with pytest.raises(ValueError), progress.start("writing", None, "rows") as task:
        task.advance()
        raise ValueError
    assert out.getvalue() == "reading [x]: 2/3 rows 0 s done\nwriting: 1 rows 0 s stopped\n"


def test_bars_on_a_terminal() -> None:
    out = StringIO()
    progress = display(Console(file=out, force_terminal=True, width=140))
    assert isinstance(progress, BarProgress)
    for label in ("first", "second"):  # the display starts again after it stopped
        with progress.start(label, 2, "steps") as outer, progress.start(f"{label} inner", None, "tokens") as inner:
            outer.advance(2)
            inner.advance(7)
    text = out.getvalue()
    assert "first" in text and "second inner" in text and "2/2" in text and "7/?" in text
