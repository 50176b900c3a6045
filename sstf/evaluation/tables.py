"""The tables of a report, from the content of its `report.json`: cells as text, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sstf.evaluation.config import PLAIN
from sstf.evaluation.rejections import CAUSES
from sstf.evaluation.run import ALL


@dataclass(frozen=True)
class Table:
    """Rows are as long as the headings."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Its lines."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def overall(report: dict[str, Any]) -> Table:
    """The rows over all prompts."""
    return _results([row for row in report["rows"] if row["category"] == ALL], "")


def groups(report: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Where prompts are of several categories, modes or lengths: what they are grouped by, and the rows of each group
    in all arms but the plain one."""
    for name, key in (("category", "rows"), ("mode", "by_mode"), ("prompt length", "by_length")):
        rows = [row for row in report[key] if row["category"] != ALL and row["arm"] != PLAIN]
        if rows:
            yield name, _results(rows, name)


def _results(rows: Sequence[dict[str, Any]], group: str) -> Table:
    """`group` names a second column; empty for none."""
    headings = ["arm", *([group] if group else []), "temperature", "prompts", "accepted length", "tokens/s", "speedup"]
    headings += ["draft ms", "verify ms", "host ms", "same text", "note"]
    cells = [
        [
            row["arm"],
            *([row["category"]] if group else []),
            f"{row['temperature']:g}",
            f"{row['prompts']}",
            _interval(row, "accepted_length"),
            f"{row['tokens_per_second']:.1f}",
            _interval(row, "speedup"),
            *(f"{row[f'{part}_ms']:.1f}" for part in ("draft", "verify", "host")),
            "" if row["identical"] is None else f"{row['identical']:.0%}",
            f"void: {row['void']}" if row["void"] else "",
        ]
        for row in rows
    ]
    return Table(headings, cells)


def positions(report: dict[str, Any]) -> Table:
    """Survival and acceptance rate by draft position."""
    cells = [
        [row["arm"], f"{row['temperature']:g}", _list(row["survival"]), _list(row["acceptance_rate"])]
        for row in report["rows"]
        if row["category"] == ALL and row["survival"]
    ]
    return Table(["arm", "temperature", "survival", "acceptance rate"], cells)


def limits(report: dict[str, Any]) -> Table:
    """What bounds each arm."""
    headings = ["arm", "temperature", "ceiling of the speedup", "a constant rate gives", "costs: draft + verify + host"]
    headings += ["speedup if drafting were free", "vocabulary cap", "tree oracle"]
    cells = [
        [
            one["arm"],
            f"{one['temperature']:g}",
            _figure(one["ceiling"]),
            _figure(one["constant_rate"]),
            f"{one['draft_cost']:.2f} + {one['verify_cost']:.2f} + {one['host_cost']:.2f}",
            _figure(one["speedup_if_drafting_were_free"]),
            _figure(one["vocabulary_cap"]),
            _figure(one["tree_oracle"]),
        ]
        for one in report["limits"]
    ]
    return Table(headings, cells)


def causes(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Rejected drafts of each arm by what counts as their cause."""
    cells = []
    for arm, found in counts.items():
        total = sum(found.values())
        cells.append([arm, f"{total}", *(f"{found[cause]} ({found[cause] / max(1, total):.0%})" for cause in CAUSES)])
    return Table(["arm", "rejected", *CAUSES], cells)


def _interval(row: dict[str, Any], figure: str) -> str:
    low, high = row[f"{figure}_ci"]
    return f"{row[figure]:.2f} ({low:.2f} to {high:.2f})"


def _list(values: Sequence[float | None]) -> str:
    return " ".join(map(_figure, values))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
