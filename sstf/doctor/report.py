"""What doctor asks and what it found: figures, a bound, a verdict, and what to do. It measures; it guesses no causes.

A `Question` is written once, beside the code that measures; its answer is a `Check`. A check that could not be made is
`skipped` and says why, so that no silence is taken for health.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["pass", "warn", "fail", "skipped"]
Part = Literal["head", "target", "data", "features", "training"]

COLOURS: dict[Verdict, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
NARROW, WIDE = 60, 110  # columns under which a table is lines, and from which it also has the bounds


@dataclass(frozen=True)
class Check:
    """One answer. `figures` are the numbers of `measured`, shares as parts of 1; `advice` is empty unless warned or
    failed. Of a skipped check, `measured` is the reason."""

    part: Part
    name: str
    verdict: Verdict
    measured: str
    bound: str
    advice: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One thing to check: its name, the bound in words, and what to do when it is not met."""

    part: Part
    name: str
    bound: str
    advice: str

    def answer(self, verdict: Verdict, measured: str, figures: Mapping[str, float] | None = None) -> Check:
        """The check with what was measured."""
        advice = self.advice if verdict in ("warn", "fail") else ""
        return Check(self.part, self.name, verdict, measured, self.bound, advice, dict(figures or {}))

    def skipped(self, reason: str) -> Check:
        """The check that could not be made."""
        return self.answer("skipped", reason)


@dataclass(frozen=True)
class Report:
    """All checks of one subject: a head's folder or a configuration. `target` is what it was checked against."""

    subject: str
    target: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        """Those that failed."""
        return [check for check in self.checks if check.verdict == "fail"]

    @property
    def fits(self) -> str:
        """Whether the head fits the target, in one line; empty where no head was looked at."""
        of_head = [check for check in self.checks if check.part in ("head", "target")]
        if not of_head or all(check.verdict == "skipped" for check in of_head):
            return ""
        against = [check for check in of_head if check.verdict == "fail"]
        if against:
            return f"fits {self.target}: no, because of {', '.join(check.name for check in against)}"
        doubts = [check for check in of_head if check.verdict == "warn"]
        return f"fits {self.target}: yes" + (f", but see {', '.join(c.name for c in doubts)}" if doubts else "")

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "subject": self.subject,
            "target": self.target,
            "verdict": "fail" if self.failed else "pass",
            "fits": self.fits,
            "checks": [asdict(check) for check in self.checks],
        }


def skipped(questions: Iterable[Question], reason: str) -> list[Check]:
    """All of the questions, unanswered for one reason."""
    return [question.skipped(reason) for question in questions]


def print_report(console: Console, report: Report) -> None:
    """A table of the checks that were made (lines in a narrow terminal), then what to do about each that is not met."""
    made = [check for check in report.checks if check.verdict != "skipped"]
    if console.width < NARROW:
        for check in made:
            line = Text.assemble((check.verdict, COLOURS[check.verdict]), f" {check.name}: {check.measured}")
            console.print(line)
    elif made:
        console.print(_table(report, made, with_bounds=console.width >= WIDE))
    for check in (*_with(made, "fail"), *_with(made, "warn")):
        line = Text.assemble((check.verdict, COLOURS[check.verdict]), f" {check.name}: {check.measured}.")
        console.print(line.append(f" Expected: {check.bound}. {check.advice}"), soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for check in _with(report.checks, "skipped"):
        reasons.setdefault(check.measured, []).append(check.name)
    for reason, names in reasons.items():
        line = Text.assemble(("skipped", COLOURS["skipped"]), f" {', '.join(names)}: {reason}")
        console.print(line, soft_wrap=True)
    counts = ", ".join(f"{len(_with(report.checks, verdict))} {verdict}" for verdict in COLOURS)
    console.print(Text(f"{counts}{'; ' if report.fits else ''}{report.fits}"), soft_wrap=True)


def _table(report: Report, checks: Sequence[Check], with_bounds: bool) -> Table:
    table = Table(title=f"{report.subject} against {report.target}", title_justify="left", expand=False)
    table.add_column("check")
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured", ratio=3)
    if with_bounds:
        table.add_column("bound", ratio=2, style="dim")
    part = ""
    for check in checks:
        if part and check.part != part:
            table.add_section()
        part = check.part
        row = [Text(check.name), Text(check.verdict, COLOURS[check.verdict]), Text(check.measured)]
        table.add_row(*row, *([Text(check.bound)] if with_bounds else []))
    return table


def _with(checks: Sequence[Check], verdict: Verdict) -> list[Check]:
    return [check for check in checks if check.verdict == verdict]
