"""`sstf reproduce CARD|HEAD`: the evaluation of a card once more, and how far its figures drift."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.cli.guard import quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("reproduce", help="measure the figures of a head's card again")
    sub.description = (
        "Run the evaluation that a head's card tells again, with its prompts, settings and seed, and compare: accepted "
        "length with the card's interval, and on the card's hardware the speedup. Exit code 1: out of tolerance."
    )
    sub.epilog = "example: sstf reproduce smollm2-eagle3"
    sub.add_argument("head", metavar="CARD|HEAD", help="a published folder, its README.md, a head, or a run with one")
    sub.add_argument("--target", metavar="NAME", help="where the target is now, if not where the head says")
    sub.add_argument("--suite", type=Path, metavar="FILE", help="the prompts, where the card's suite is a file")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> int:
    """Exit code 1 when a figure is out of tolerance."""
    quiet_libraries()
    from sstf.formats import find_head
    from sstf.progress_display import display
    from sstf.publish.reproduce import reproduce

    named = Path(args.head)
    folder = find_head(str(named.parent if named.name == "README.md" else named))
    found = reproduce(folder, args.target, args.suite, display(err))
    words = {True: "within", False: "OUTSIDE", None: "not judged"}
    table = Table(title=f"{folder}, measured again", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("how", "temp.", "figure", "card (tolerance)", "now", "drift", "verdict"):
        table.add_column(heading, justify="right" if heading in ("temp.", "now", "drift") else "left")
    for drift in found:
        low, high = drift.bounds
        table.add_row(
            drift.arm,
            f"{drift.temperature:g}",
            drift.figure.replace("_", " "),
            f"{drift.card:.3f} ({low:.3f} to {high:.3f})",
            f"{drift.now:.3f}",
            f"{drift.change:+.1%}",
            words[drift.within],
        )
    console = Console(highlight=False)
    console.print(table)
    outside = sum(drift.within is False for drift in found)
    judged = sum(drift.within is not None for drift in found)
    console.print(Text(f"{judged - outside} of {judged} figures are within the card's tolerance"), soft_wrap=True)
    if judged < len(found):
        why = "speedups are judged on the card's hardware only, and where no row is void"
        console.print(Text(why), soft_wrap=True)
    return 1 if outside else 0
