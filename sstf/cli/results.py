"""The tables of an evaluation, and of two that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from sstf.evaluation.against import Paired


def results(rows: list[dict[str, Any]]) -> Table:
    """Of the rows over all prompts; see `evaluation.Row` for their fields."""
    table = Table(title="decoding, batch 1", title_justify="left")
    for heading in ("how", "temperature", "accepted length", "tokens/s", "speedup", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    for row in rows:
        low, high = row["speedup_ci"]
        table.add_row(
            str(row["arm"]) + (f" (void: {row['void']})" if row["void"] else ""),
            f"{row['temperature']:g}",
            f"{row['accepted_length']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    return table


def differences(pairs: Sequence[Paired]) -> Table:
    """Of a new report against an old one, prompt by prompt."""
    table = Table(title="new minus old, means over the same prompts", title_justify="left")
    for heading in ("how", "temperature", "figure", "old", "new", "difference", "95 % interval", "better / worse", "p"):
        table.add_column(heading, justify="left" if heading in ("how", "figure") else "right")
    table.add_column("verdict")
    for pair in pairs:
        low, high = pair.difference_ci
        table.add_row(
            pair.arm,
            f"{pair.temperature:g}",
            pair.figure.replace("_", " "),
            f"{pair.old:.3f}",
            f"{pair.new:.3f}",
            f"{pair.difference:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{pair.better} / {pair.worse} of {pair.prompts}",
            f"{pair.p_value:.3f}",
            pair.verdict,
        )
    return table
