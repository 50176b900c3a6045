"""`sstf eval HEAD`: what a head in any form reaches on its target, without a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries
from sstf.cli.results import differences, results
from sstf.errors import ConfigError


def add_options(sub: argparse.ArgumentParser) -> None:
    """What `sstf eval` takes beside a configuration."""
    sub.description = (
        "Measure accepted length and speedup against the plain target. Of a run: the stages that it needs and that are "
        "not done run first. Of a head in any form, a folder: as many of the settings of `eval` as are given."
    )
    sub.epilog = f"{sub.epilog}; of a head: sstf eval EAGLE3-head --target org/model eval.prompts=8 --out report"
    sub.add_argument("--target", metavar="NAME", help="of a head: its target, if not where the head says")
    sub.add_argument("--out", type=Path, metavar="DIR", help="of a head: write the report there")
    sub.add_argument(
        "--against",
        type=Path,
        metavar="REPORT",
        help="compare with an earlier report.json prompt by prompt: differences, their intervals, a sign test",
    )


def earlier(args: argparse.Namespace) -> dict[str, Any] | None:
    """The report to compare with, read before hours of work."""
    if args.against is None:
        return None
    from sstf.evaluation.against import read_report

    return read_report(args.against)


def show_against(old: dict[str, Any], new: dict[str, Any], folder: Path | None, out: Console) -> None:
    """Print how `new` differs from `old`, and write it to `folder`.

    Raises:
        DataError: the two cannot be compared.
    """
    from sstf.data.atomic import write_bytes_atomic
    from sstf.evaluation.against import compare, markdown

    pairs = compare(old, new)
    out.print(differences(pairs))
    if folder:
        write_bytes_atomic(folder / "against.md", markdown(pairs, old, new).encode())
        out.print(Text(f"{'differences':<15}{folder / 'against.md'}"), soft_wrap=True)


def evaluate_head(args: argparse.Namespace, err: Console) -> None:
    """Evaluate the head that `args.config` names.

    Raises:
        SstfError: a setting, the head or the target cannot be used.
    """
    quiet_libraries()
    from sstf.config_loading import load_options
    from sstf.evaluation import EvalConfig, measure, write_report
    from sstf.evaluation.report import report
    from sstf.formats import find_head, load_any, target_of
    from sstf.progress_display import display

    settings = {}
    for override in args.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        if section != "eval" or not name or "." in name:
            raise ConfigError(f"{override}: a head is evaluated by settings such as eval.prompts=8 alone")
        settings[name] = value
    config = load_options(EvalConfig, settings)
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"{args.out} is no folder; --out names one for the report")
    old = earlier(args)
    folder = find_head(str(args.config))
    progress = display(err)
    with progress.start("loading", 1, "head") as bar:
        target = target_of(folder, args.target)
        head = load_any(folder, target)
        config = config.fitted(head.method.limits, f"head {folder}")
        bar.advance(1)
    found = measure(target, head, config, progress)
    out = Console()
    out.print(results([vars(row) for row in found.rows if row.category == "all"]))
    settings_json = config.model_dump(mode="json")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = write_report(args.out, found, target, str(folder), settings_json, progress.note)
        out.print(Text(f"{'report':<15}{args.out / 'report.md'}"), soft_wrap=True)
        out.print(Text(f"{'page':<15}{args.out / 'report.html'}"), soft_wrap=True)
        out.print(Text(f"{'overhead':<15}{content['overhead']:.1%} of the time was not decoding"), soft_wrap=True)
    if old:
        show_against(old, report(found, target, str(folder), settings_json), args.out, out)
