"""`sstf doctor HEAD|CONFIG`: measures what goes wrong without an error, in a head or in a run that makes one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries

if TYPE_CHECKING:
    from sstf.data.progress import Progress
    from sstf.doctor import Check, Report
    from sstf.pipeline import Run


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("doctor", help="check a head, or a run and its head, for failures that raise no error")
    sub.description = (
        "Check a head against its target, or a configuration with its data, features, training and head, for what goes "
        "wrong without an error. Every check gives a figure, a bound, a verdict and what to do. Nothing is written. "
        "Exit code 1: a check failed."
    )
    sub.epilog = "example: sstf doctor runs/demo --json"
    sub.add_argument("subject", metavar="HEAD|CONFIG", help="a head's folder, a run with one, or a run's YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the YAML file's")
    sub.add_argument("--target", metavar="NAME", help="of a head: its target, if not where the head says")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> int:
    """Exit code 1 when a check failed."""
    quiet_libraries()
    from sstf.doctor import examine, print_report
    from sstf.errors import ConfigError
    from sstf.progress_display import display

    if Path(args.subject).suffix in (".yaml", ".yml"):
        if args.target:
            raise ConfigError("--target is for a head's folder; with a configuration, override target.name")
        report = _of_run(Path(args.subject), args.overrides, display(err))
    else:
        if args.overrides:
            raise ConfigError(f"{args.overrides[0]} would change a YAML file, and {args.subject} is none")
        report = examine(args.subject, args.target, display(err))
    out = Console()
    if args.json:
        out.print(Text(json.dumps(report.to_json(), indent=2)), soft_wrap=True)
    else:
        print_report(out, report)
    return 1 if report.failed else 0


def _of_run(config: Path, overrides: list[str], progress: Progress) -> Report:
    """All that a configuration has so far."""
    from sstf.doctor import Report, check_head
    from sstf.doctor.examine import QUESTIONS
    from sstf.doctor.report import skipped
    from sstf.pipeline import load_run

    run = load_run(config, overrides, progress)
    target = run.target
    checks = [*_data(run), *_features(run), *_training(run)]
    if run.trains and run.summary(run.head_stage) is not None:
        checks += check_head(run.head, target, progress)
    else:
        checks += skipped(QUESTIONS, _undone(run, run.head_stage))
    return Report(str(config), target.spec.name, tuple(checks))


def _undone(run: Run, stage: str) -> str:
    return f"the {stage} stage is not done" if run.trains else f"method {run.config.method.kind} has no head"


def _data(run: Run) -> list[Check]:
    from sstf.doctor.data import QUESTIONS, check_data
    from sstf.doctor.report import skipped

    if run.summary("data") is None and run.config.data.source.kind == "self_written":
        return skipped(QUESTIONS, "the target has still to write the conversations")
    samples, sources, final = run.samples()
    rows = []
    if final:
        # Not `splitlines`: JSON allows U+2028 and its like within a text.
        text = (run.folder("data") / "conversations.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
    spec, config = run.target.spec, run.config.data
    return check_data(samples, sources, rows, run.target.tokenizer, spec.vocab_size, config.max_length, config.turns)


def _features(run: Run) -> list[Check]:
    from sstf.doctor.features import QUESTIONS, check_store
    from sstf.doctor.report import skipped
    from sstf.features import FeatureStore

    if run.online:
        return skipped(QUESTIONS, "nothing is stored: extract.online is true")
    if not run.trains or run.summary("extract") is None:
        return skipped(QUESTIONS, _undone(run, "extract"))
    store = FeatureStore(run.folder("extract"))
    return check_store(store, run.samples()[0], run.target, run.method.feature_spec(run.target.spec))


def _training(run: Run) -> list[Check]:
    from sstf.doctor.report import skipped
    from sstf.doctor.training import QUESTIONS, check_training, initial_weights
    from sstf.methods.checkpoint import read_head

    if not run.trains or run.summary("train") is None:
        return skipped(QUESTIONS, _undone(run, "train"))
    folder = run.folder("train")
    head, config = read_head(folder / "head"), run.config.train
    drawn = config.warm_start is None and config.resume_from is None
    start = initial_weights(head, run.target.frozen_head, run.config.seed) if drawn else None
    return check_training(folder, head, run.samples()[0], start)
