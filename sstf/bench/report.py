"""A bench's result: as JSON, whole, and as tables in a terminal, where only ratios have their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.bench.acceptance import Acceptance, acceptance
from sstf.bench.drive import Load, Measured
from sstf.bench.figures import (
    METRICS,
    PERCENTILES,
    Interval,
    Latencies,
    Metric,
    Throughput,
    draws,
    latencies,
    throughput,
)
from sstf.bench.shadow import Advice
from sstf.bench.usage import Usage

SCHEMA = "sstf-bench/1"
SHOWN_DIFFERENCES = 5
SHOWN_ERRORS = 3


@dataclass(frozen=True)
class SideFigures:
    """One server under one load."""

    throughput: Throughput
    rounds: list[float | None]  # tokens/s of each
    acceptance: Acceptance | None
    usage: Usage | None
    latest_s: float  # the longest that a request was sent after it was due
    errors: list[str]  # distinct


@dataclass(frozen=True)
class LoadFigures:
    """Both servers under one load."""

    name: str
    requests: int
    baseline: SideFigures
    candidate: SideFigures
    latencies: dict[Metric, Latencies]

    def to_json(self) -> dict[str, Any]:
        """Times in seconds; a figure with an interval is `[value, low, high]`, one for each of P50, P95, P99."""
        sides = {}
        for name, side in (("baseline", self.baseline), ("candidate", self.candidate)):
            sides[name] = {
                **side.throughput.to_json(),
                "tokens_per_s_of_rounds": side.rounds,
                "latest_send_s": side.latest_s,
                "errors": side.errors,
                "acceptance": side.acceptance and side.acceptance.to_json(),
                "usage": side.usage and side.usage.to_json(),
            }
        return {
            "load": self.name,
            "requests": self.requests,
            **sides,
            "latency_s": {
                metric: {of: [figure and figure.to_json() for figure in figures] for of, figures in vars(found).items()}
                for metric, found in self.latencies.items()
            },
        }


def load_figures(load: Load, objective: dict[Metric, float]) -> LoadFigures:
    """Every figure of a load."""
    baseline, candidate = load.aligned()
    drawn = draws(len(load.requests))
    return LoadFigures(
        load.level.name,
        len(load.requests),
        _side(load.baseline, objective),
        _side(load.candidate, objective),
        {metric: latencies(baseline, candidate, metric, drawn) for metric in METRICS},
    )


def _side(measured: Measured, objective: dict[Metric, float]) -> SideFigures:
    answers = measured.answers
    whole = [answer for answer in answers if not answer.error]
    counts = [answer.tokens for answer in whole]
    received = None if None in counts else sum(count for count in counts if count is not None)
    return SideFigures(
        throughput(answers, measured.wall_s, objective),
        [throughput(each.answers, each.wall_s, objective).tokens_per_s for each in measured.rounds],
        acceptance(measured.before, measured.after, received, len(whole)),
        measured.usage,
        max((answer.late_s for answer in answers), default=0.0),
        list(dict.fromkeys(answer.error for answer in answers if answer.error)),
    )


@dataclass(frozen=True)
class Report:
    """All of a bench."""

    about: dict[str, Any]  # when, what was asked of whom, and how
    loads: list[LoadFigures]
    partial: str | None
    advice: Advice | None

    @property
    def good(self) -> bool:
        """Whether the run is whole and nothing speaks against the candidate."""
        return self.partial is None and (self.advice is None or self.advice.go)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "schema": SCHEMA,
            "partial": self.partial,
            **self.about,
            "loads": [load.to_json() for load in self.loads],
            "advice": self.advice and self.advice.to_json(),
        }

    def print(self, out: Console) -> None:
        """Tables, notes and the advice."""
        for load in self.loads:
            out.print(_table(load))
            for side, figures in (("baseline", load.baseline), ("candidate", load.candidate)):
                for error in figures.errors[:SHOWN_ERRORS]:
                    out.print(Text(f"{side} failed: {error}"), soft_wrap=True)
        for note in self.about["notes"]:
            out.print(Text(note), soft_wrap=True)
        if self.advice:
            _print_advice(self.advice, out)
        if self.partial:
            out.print(Text.assemble(("PARTIAL: ", "bold red"), self.partial), soft_wrap=True)


def _table(load: LoadFigures) -> Table:
    table = Table(title=f"{load.name}, {load.requests} requests to each", title_justify="left")
    for heading in ("", "baseline", "candidate", "ratio (95 %)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for metric, found in load.latencies.items():
        for i, percentile in enumerate(PERCENTILES):
            old, new, ratio = found.baseline[i], found.candidate[i], found.ratio[i]
            shown = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "-"
            table.add_row(f"{metric} P{percentile} ms", _ms(old), _ms(new), shown)
        table.add_section()
    old_side, new_side = load.baseline, load.candidate
    old_flow, new_flow = old_side.throughput, new_side.throughput
    _add(table, "requests/s", old_flow.requests_per_s, new_flow.requests_per_s)
    _add(table, "tokens/s", old_flow.tokens_per_s, new_flow.tokens_per_s)
    table.add_row("  its rounds", _rounds(old_side.rounds), _rounds(new_side.rounds), "")
    if old_flow.goodput is not None:
        _add(table, "goodput req/s", old_flow.goodput, new_flow.goodput)
        _add(table, "  of all requests", old_flow.good_share, new_flow.good_share)
    table.add_row("failed", str(old_flow.failed), str(new_flow.failed), "")
    if max(old_side.latest_s, new_side.latest_s) > 0:
        table.add_row("sent late, at most ms", f"{old_side.latest_s * 1e3:.1f}", f"{new_side.latest_s * 1e3:.1f}", "")
    sides = (old_side, new_side)
    if any(side.acceptance for side in sides):
        table.add_section()
        table.add_row(
            "accepted length", *(f"{s.acceptance.accepted_length:.3f}" if s.acceptance else "-" for s in sides)
        )
        table.add_row("survival", *(_list(s.acceptance.survival) if s.acceptance else "-" for s in sides))
    if any(side.usage for side in sides):
        table.add_section()
        table.add_row("cores busy", *(f"{s.usage.cores:.2f}" if s.usage else "-" for s in sides))
        table.add_row("  of others", *(f"{s.usage.others_cores:.2f}" if s.usage else "-" for s in sides))
        table.add_row("memory GiB", *(f"{s.usage.peak_bytes / 2**30:.2f}" if s.usage else "-" for s in sides))
        if any(s.usage and s.usage.gpu_busy is not None for s in sides):
            table.add_row("GPU busy", *(_or_dash(s.usage.gpu_busy if s.usage else None) for s in sides))
            table.add_row("GPU memory GiB", *(_or_dash(s.usage.gpu_bytes if s.usage else None, 2**-30) for s in sides))
    return table


def _add(table: Table, name: str, old: float | None, new: float | None) -> None:
    ratio = f"{new / old:.2f}" if old and new is not None else "-"
    table.add_row(name, _or_dash(old), _or_dash(new), ratio)


def _or_dash(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.2f}"


def _ms(figure: Interval | None) -> str:
    return f"{figure.value * 1e3:,.1f}" if figure else "-"


def _rounds(rates: list[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values) or "-"


def _print_advice(advice: Advice, out: Console) -> None:
    table = Table(title="the candidate in the baseline's place", title_justify="left")
    for heading in ("check", "found", "limit", ""):
        table.add_column(heading)
    for check in advice.checks:
        verdict = {True: "holds", False: "FAILS", None: "not judged"}[check.holds]
        table.add_row(*map(Text, (check.name, check.found, check.limit, verdict)))
    out.print(table)
    if advice.median_share is not None:
        share = f"{advice.median_share:.0%}"
        out.print(Text(f"greedy answers that differ do so after {share} of the text, in the median; the first:"))
    for difference in advice.differences[:SHOWN_DIFFERENCES]:
        out.print(Text(f"  request {difference.request}, after {difference.at} of {difference.length} characters"))
        for name, text in (("baseline", difference.baseline), ("candidate", difference.candidate)):
            out.print(Text(f"    {name:<10}{difference.before!r} -> {text!r}"), soft_wrap=True)
    out.print(Text.assemble((("GO" if advice.go else "NO-GO"), "bold"), ": ", advice.reason), soft_wrap=True)
