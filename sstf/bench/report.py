"""A bench's result: as JSON, whole, and as tables in a terminal, where only ratios have their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
HEADINGS = ("", "baseline", "candidate", "ratio (95 %)")
Cells = tuple[str, str, str, str]  # a row under them
VERDICTS = {True: "holds", False: "FAILS", None: "not judged"}  # of a check
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
    concurrency: int | None
    requests: int
    baseline: SideFigures
    candidate: SideFigures
    latencies: dict[Metric, Latencies]

    @property
    def title(self) -> str:
        """For a table."""
        return f"{self.name}, {self.requests} requests to each"

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
            "concurrency": self.concurrency,
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
        load.level.concurrency,
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
    table = Table(title=load.title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if not heading else "right")
    for section in sections(load):
        for cells in section:
            table.add_row(*cells)
        table.add_section()
    return table


def sections(load: LoadFigures) -> list[list[Cells]]:
    """The rows of a load's table under `HEADINGS`, in groups."""
    old, new = load.baseline, load.candidate
    times: list[list[Cells]] = [
        [
            (f"{metric} P{percentile} ms", _ms(found.baseline[i]), _ms(found.candidate[i]), _ratio(found.ratio[i]))
            for i, percentile in enumerate(PERCENTILES)
        ]
        for metric, found in load.latencies.items()
    ]
    was, now = old.throughput, new.throughput
    flow = [
        _figure("requests/s", was.requests_per_s, now.requests_per_s),
        _figure("tokens/s", was.tokens_per_s, now.tokens_per_s),
        ("  its rounds", _rounds(old.rounds), _rounds(new.rounds), ""),
    ]
    if was.goodput is not None:
        flow.append(_figure("goodput req/s", was.goodput, now.goodput))
        flow.append(_figure("  of all requests", was.good_share, now.good_share))
    flow.append(("failed", str(was.failed), str(now.failed), ""))
    if max(old.latest_s, new.latest_s) > 0:
        flow.append(("sent late, at most ms", f"{old.latest_s * 1e3:.1f}", f"{new.latest_s * 1e3:.1f}", ""))
    accepted = (old.acceptance, new.acceptance)
    drafts: list[Cells] = []
    if any(accepted):
        drafts = [
            ("accepted length", *_pair(f"{found.accepted_length:.3f}" if found else "-" for found in accepted), ""),
            ("survival", *_pair(_list(found.survival) if found else "-" for found in accepted), ""),
        ]
    use: list[Cells] = []
    if old.usage or new.usage:
        use = [
            _use(load, "cores busy", lambda usage: usage.cores),
            _use(load, "  of others", lambda usage: usage.others_cores),
            _use(load, "memory GiB", lambda usage: usage.peak_bytes / 2**30),
        ]
        if any(usage and usage.gpu_busy is not None for usage in (old.usage, new.usage)):
            use.append(_use(load, "GPU busy", lambda usage: usage.gpu_busy))
            use.append(
                _use(load, "GPU memory GiB", lambda usage: None if usage.gpu_bytes is None else usage.gpu_bytes / 2**30)
            )
    return [section for section in (*times, flow, drafts, use) if section]


def _pair(texts: Iterable[str]) -> tuple[str, str]:
    old, new = texts
    return old, new


def _use(load: LoadFigures, name: str, read: Callable[[Usage], float | None]) -> Cells:
    old, new = _pair(_or_dash(read(side.usage) if side.usage else None) for side in (load.baseline, load.candidate))
    return name, old, new, ""


def _figure(name: str, old: float | None, new: float | None) -> Cells:
    ratio = f"{new / old:.2f}" if old and new is not None else "-"
    return name, _or_dash(old), _or_dash(new), ratio


def _ratio(found: Interval | None) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "-"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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
        table.add_row(*map(Text, (check.name, check.found, check.limit, VERDICTS[check.holds])))
    out.print(table)
    if advice.median_share is not None:
        share = f"{advice.median_share:.0%}"
        out.print(Text(f"greedy answers that differ do so after {share} of the text, in the median; the first:"))
    for difference in advice.differences[:SHOWN_DIFFERENCES]:
        out.print(Text(f"  request {difference.request}, after {difference.at} of {difference.length} characters"))
        for name, text in (("baseline", difference.baseline), ("candidate", difference.candidate)):
            out.print(Text(f"    {name:<10}{difference.before!r} -> {text!r}"), soft_wrap=True)
    out.print(Text.assemble((("GO" if advice.go else "NO-GO"), "bold"), ": ", advice.reason), soft_wrap=True)
