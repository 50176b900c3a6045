"""The plots of an evaluation, from the content of its `report.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from sstf.decode import CostModel
from sstf.evaluation.charts import Bar, bars, lines, stacked
from sstf.evaluation.config import NGRAM, PLAIN
from sstf.evaluation.run import ALL

Row = dict[str, Any]  # of the report's `rows`, `distributions`, ...


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Every plot that the report has figures for, as SVG, by a name for a file."""
    rows = report["rows"]
    drafted = [row for row in rows if row["category"] == ALL and row["arm"] != PLAIN]
    name = _namer(rows)
    temperature = rows[0]["temperature"]
    found = {
        "survival": survival_plot(rows),
        "acceptance-rate": lines(
            {
                name(row): [(i, rate) for i, rate in enumerate(row["acceptance_rate"], 1) if rate is not None]
                for row in drafted
                if row["survival"]
            },
            "Acceptance rate: of the passes that reached position i",
            "draft position",
            "share accepted",
        ),
        "tokens-of-a-pass": _histogram(report, temperature),
        "accepted-length-by-category": _groups(rows, temperature, "accepted_length", "Accepted length by category"),
        "speedup-by-category": _groups(rows, temperature, "speedup", "Speedup by category"),
        "accepted-length-by-mode": _groups(
            report["by_mode"], temperature, "accepted_length", "Accepted length by mode"
        ),
        "accepted-length-by-prompt-length": _groups(
            report["by_length"], temperature, "accepted_length", "Accepted length by prompt length"
        ),
        "time-of-a-token": stacked(
            [name(row) for row in rows if row["category"] == ALL],
            {
                part: [
                    max(0.0, row[f"{part}_ms"]) / (row["accepted_length"] or 1.0)
                    for row in rows
                    if row["category"] == ALL
                ]
                for part in ("draft", "verify", "host")
            },
            "Where the time of a token goes",
            "milliseconds a token",
        ),
        "accepted-length-by-context": lines(
            {
                name(one): [((b["low"] or b["high"] / 2) * 1.0, b["accepted_length"]) for b in one["by_context"]]
                for one in report["distributions"]
                if one["arm"] != NGRAM
            },
            "Accepted length by context length",
            "tokens in the context, from",
            "accepted length",
            doubling=True,
        ),
        "speedup-by-depth": _speedup_by_depth(report),
        "training": training_plot(report["training"] or []),
    }
    return {key: svg for key, svg in found.items() if svg}


def survival_plot(rows: Sequence[Row]) -> str:
    """Of every arm that drafts, over all prompts."""
    name = _namer(rows)
    return lines(
        {
            name(row): list(enumerate(row["survival"], 1))
            for row in rows
            if row["category"] == ALL and row["arm"] != PLAIN and row["survival"]
        },
        "Survival: passes that accepted position i",
        "draft position",
        "share of passes",
    )


def training_plot(points: Sequence[tuple[int, float]]) -> str:
    """Simulated accepted length on held-out conversations, by optimiser step."""
    return lines(
        {"held-out conversations": points},
        "Training",
        "optimiser step",
        "simulated accepted length",
        y_from=1.0 if all(y >= 1 for _, y in points) else 0.0,
    )


def _namer(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Names an arm's row, with its temperature where there are several."""
    several = len({row["temperature"] for row in rows}) > 1
    return lambda row: f"{row['arm']}, T={row['temperature']:g}" if several else str(row["arm"])


def _histogram(report: dict[str, Any], temperature: float) -> str:
    found = [d for d in report["distributions"] if d["temperature"] == temperature]
    longest = max((len(d["histogram"]) for d in found), default=0)
    series = {}
    for one in found:
        passes = max(1, sum(one["histogram"]))
        padded = [*one["histogram"], *[0] * (longest - len(one["histogram"]))]
        series[one["arm"]] = [Bar(count / passes) for count in padded]
    names = [str(length) for length in range(1, longest + 1)]
    return bars(names, series, f"Tokens emitted by a pass (T={temperature:g})", "share of passes") if names else ""


def _groups(rows: list[dict[str, Any]], temperature: float, figure: str, title: str) -> str:
    """Of the arms of a head; the interval is the 95 % bootstrap over prompts."""
    own = [row for row in rows if row["temperature"] == temperature and row["arm"] != PLAIN]
    names = [name for name in dict.fromkeys(row["category"] for row in own) if name != ALL]
    if not names:
        return ""
    series: dict[str, list[Bar | None]] = {}
    for arm in dict.fromkeys(row["arm"] for row in own):
        by_name = {row["category"]: row for row in own if row["arm"] == arm}
        series[arm] = [
            Bar(by_name[name][figure], *by_name[name][f"{figure}_ci"]) if name in by_name else None for name in names
        ]
    return bars(names, series, f"{title} (T={temperature:g})", figure.replace("_", " "))


def _speedup_by_depth(report: dict[str, Any]) -> str:
    """Of a chain, by the cost model: survival as measured, costs as measured at each batch size."""
    policies = report["eval"].get("policies", {})
    chain = next((name for name, policy in policies.items() if policy["kind"] == "chain"), None)
    row = next((r for r in report["rows"] if r["arm"] == chain and r["category"] == ALL), None)
    if row is None:
        return ""
    lengths = list(accumulate(row["survival"], initial=1.0))
    series = {}
    for batch, saved in report["costs"].items():
        cost = CostModel.from_json(saved)
        series[f"batch {batch}"] = [
            (float(depth), cost.speedup(lengths[depth], depth, depth)) for depth in range(1, len(lengths))
        ]
    return lines(series, "Speedup of a chain by its depth (cost model)", "depth", "speedup over plain decoding")
