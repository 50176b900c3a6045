"""A bench as one HTML page: the advice with its reason, latency and throughput by load, acceptance, and where answers
go apart. Its look is the evaluation's, see `evaluation.document`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

from sstf.bench.figures import METRICS, PERCENTILES, Interval, Metric
from sstf.bench.report import HEADINGS, VERDICTS, LoadFigures, Report, SideFigures, sections
from sstf.bench.shadow import Advice, Difference
from sstf.evaluation.charts import Bar, bars, lines
from sstf.evaluation.document import document, gallery, paragraph, table

SIDES = ("baseline", "candidate")
NAMES: dict[Metric, str] = {
    "ttft": "Time to the first token",
    "itl": "Time between tokens",
    "tpot": "Time per output token after the first",
    "e2e": "Time of a whole answer",
}
SHOWN_DIFFERENCES = 100
STYLE = """
#verdict { border: 1px solid var(--line); border-left: 6px solid var(--soft); background: var(--panel);
  padding: .6rem .8rem; margin: .8rem 0; font-size: 1.05rem; overflow-wrap: anywhere; }
#verdict.go { border-left-color: var(--c2); }
#verdict.no { border-left-color: var(--c1); }
.code { font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.old { background: var(--good); }
.new { background: var(--wrong); }
#differences { padding-left: 1.2rem; }
#differences li { margin: .6rem 0; }
"""


def page(report: Report) -> str:
    """The whole file."""
    servers, settings = report.about["servers"], report.about["settings"]
    old, new = (servers[side] for side in SIDES)
    asked = next(
        (f"{name} {settings[name]}" for name in ("shadow", "mirror") if settings[name] is not None),
        f"suite {settings['suite']}, at most {settings['max_tokens']} tokens, temperature {settings['temperature']:g}",
    )
    body = [
        paragraph(f"Baseline {old['model']} at {old['url']}, candidate {new['model']} at {new['url']}; {asked}."),
        paragraph(f"Started {report.about['started']}."),
        *_verdict(report),
    ]
    if report.advice:
        body += _advice(report.advice)
    plots = figures(report.loads)
    if plots:
        body += ["<h2>Plots</h2>", gallery(plots)]
    for load in report.loads:
        body.append(f"<h2>{html.escape(load.title)}</h2>")
        body.append(table(HEADINGS, [cells for section in sections(load) for cells in section]))
        for side in SIDES:
            body += [paragraph(f"{side} failed: {error}") for error in _side(load, side).errors]
    if report.about["notes"]:
        body += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in report.about["notes"]), "</ul>"]
    return document(f"{new['model']} against {old['model']}", body, STYLE)


def _verdict(report: Report) -> list[str]:
    advice = report.advice
    if advice is None:
        text, kind = "No advice: answers are compared, and judged, with --shadow or --mirror.", "none"
    else:
        text, kind = (f"GO: {advice.reason}", "go") if advice.go else (f"NO-GO: {advice.reason}", "no")
    parts = [f'<p id="verdict" class="{kind}">{html.escape(text)}</p>']
    if report.partial:
        parts.append(f'<p id="partial"><strong>PARTIAL:</strong> {html.escape(report.partial)}</p>')
    return parts


def _advice(advice: Advice) -> list[str]:
    checks = [[check.name, check.found, check.limit, VERDICTS[check.holds]] for check in advice.checks]
    parts = ["<h2>The candidate in the baseline's place</h2>", table(("check", "found", "limit", ""), checks)]
    if advice.differences:
        shown = advice.differences[:SHOWN_DIFFERENCES]
        rest = f"; the first {len(shown)} of them" if len(shown) < len(advice.differences) else ""
        share = advice.median_share or 0.0
        parts += [
            "<h2>Where answers go apart</h2>",
            paragraph(
                f"{len(advice.differences)} of {advice.greedy} greedy answers differ, in the median after {share:.0%} "
                f"of the text{rest}. The baseline's text, then the candidate's, from the first difference on."
            ),
            '<ol id="differences">',
            *map(_difference, shown),
            "</ol>",
        ]
    return parts


def _difference(found: Difference) -> str:
    before, old, new = map(html.escape, (found.before, found.baseline, found.candidate))
    where = html.escape(f"request {found.request}, after {found.at} of {found.length} characters")
    return (
        f'<li>{where}<div class="code">{before}<span class="old">{old}</span></div>'
        f'<div class="code">{before}<span class="new">{new}</span></div></li>'
    )


# ---- plots -----------------------------------------------------------------------------------------------------------


def figures(loads: Sequence[LoadFigures]) -> dict[str, str]:
    """Every plot that there are figures for, by name."""
    found = {metric: _latency(loads, metric) for metric in METRICS} | {
        "tokens": _flow(loads, "Tokens a second", "tokens/s", lambda side: side.throughput.tokens_per_s),
        "requests": _flow(loads, "Requests a second", "requests/s", lambda side: side.throughput.requests_per_s),
        "goodput": _flow(
            loads, "Requests a second that keep to the objective", "requests/s", lambda side: side.throughput.goodput
        ),
        "accepted-length": _flow(
            loads,
            "Accepted length",
            "tokens a verify pass",
            lambda side: side.acceptance.accepted_length if side.acceptance else None,
        ),
        "survival": _survival(loads),
    }
    return {name: svg for name, svg in found.items() if svg}


def _latency(loads: Sequence[LoadFigures], metric: Metric) -> str:
    """Percentiles of both servers; with their intervals where they stand in bars."""
    title, unit = f"{NAMES[metric]} ({metric})", "milliseconds"
    found = {side: [vars(load.latencies[metric])[side] for load in loads] for side in SIDES}
    if len(loads) == 1:
        return bars(
            [f"P{percentile}" for percentile in PERCENTILES],
            {side: [_bar(interval, 1e3) for interval in found[side][0]] for side in SIDES},
            title,
            unit,
        )
    series = {
        f"{side} P{percentile}": [_bar(row[i], 1e3) for row in found[side]]
        for side in SIDES
        for i, percentile in enumerate(PERCENTILES)
    }
    return _by_load(loads, series, title, unit)


def _flow(loads: Sequence[LoadFigures], title: str, unit: str, figure: Callable[[SideFigures], float | None]) -> str:
    # Also a side without any, so that a colour stands for the same side in every plot.
    values = {side: [figure(_side(load, side)) for load in loads] for side in SIDES}
    series = {side: [None if value is None else Bar(value) for value in row] for side, row in values.items()}
    return _by_load(loads, series, title, unit)


def _by_load(loads: Sequence[LoadFigures], series: Mapping[str, Sequence[Bar | None]], title: str, unit: str) -> str:
    """Against concurrency where every load has one, else beside one another."""
    users = [load.concurrency for load in loads if load.concurrency]
    if len(users) < max(2, len(loads)):
        return bars([load.name for load in loads], series, title, unit)
    against = {
        name: sorted((x, bar.value) for x, bar in zip(users, row, strict=True) if bar) for name, row in series.items()
    }
    return lines(against, title, "concurrency", unit, doubling=True)


def _survival(loads: Sequence[LoadFigures]) -> str:
    series = {
        f"{side}, {load.name}" if len(loads) > 1 else side: list(enumerate(found.survival, 1))
        for side in SIDES
        for load in loads
        if (found := _side(load, side).acceptance) and found.survival
    }
    return lines(series, "Survival: passes that accepted position i", "draft position", "share of passes")


def _side(load: LoadFigures, side: str) -> SideFigures:
    return load.baseline if side == "baseline" else load.candidate


def _bar(found: Interval | None, scale: float) -> Bar | None:
    return Bar(found.value * scale, found.low * scale, found.high * scale) if found else None
