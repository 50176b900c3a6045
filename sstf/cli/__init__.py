"""The command line: `sstf run CONFIG` and one command a stage. Thin: the work is in `pipeline`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from sstf.cli import bench, dashboard, doctor, evaluate, export, init, parity, publish, pull, reproduce, serve, tune
from sstf.cli.guard import complain, guarded, quiet_libraries
from sstf.cli.results import results

if TYPE_CHECKING:
    from sstf.pipeline import Run

EXAMPLE = "configs/smollm2-135m-instruct/demo.yaml"
COMMANDS = {
    "run": ("run every stage that is not done, in order, and print the results", ("eval", "export")),
    "data": ("conversations with the target's answers, as token ids and loss masks", ("data",)),
    "extract": ("hidden states of the target, as a feature store", ("extract",)),
    "train": ("train the head in this process (several: accelerate launch -m sstf.train CONFIG)", ("train",)),
    "on-policy": ("train the head further on its own rollouts (section on_policy; one process)", ("on_policy",)),
    "eval": ("measure accepted length and speedup against the plain target", ("eval",)),
    "export": ("write the head in the forms that serving engines load", ("export",)),
}
# Commands with a module of their own, in the order of `--help`. Its `add(commands)` makes the parser, whose default
# `work` is `(args, err) -> exit code or None`; what is heavy is imported when it runs.
MODULES: tuple[ModuleType, ...] = (init, doctor, parity, publish, pull, reproduce, bench, dashboard, serve, tune)
# Checked by `chat.ChatConfig`, whose defaults these texts repeat.
CHAT_OPTIONS = (
    ("--policy", "YAML", "how to draft (default: a cost-aware tree with lookup)"),
    ("--temperature", "T", "0 is greedy (default: 0)"),
    ("--top-p", "P", "sample from the most likely tokens that hold this share (default: 1)"),
    ("--top-k", "K", "sample from so many most likely tokens; 0 is off (default: 0)"),
    ("--max-new-tokens", "N", "the longest answer (default: 512)"),
    ("--seed", "N", "of the sampling (default: 0)"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with 0, 2 (bad input), 3 (damaged data) or 130 (interrupted)."""
    sys.exit(run_command(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides once an option stood between them.
    if any(text.startswith("-") or "=" not in text or "overrides" not in args for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sstf",
        description="Train draft heads that make a frozen language model decode faster without changing its words.",
        epilog=f"example: sstf run {EXAMPLE}",
    )
    parser.add_argument("--version", action="version", version=f"sstf {version('sstf')}")
    parser.set_defaults(work=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Stages that it needs and that are not done run first.",
            epilog=f"example: sstf {name} {EXAMPLE} train.optimizer.learning_rate=3e-4",
        )
        _add_config(sub)
        if name == "data":
            look = sub.add_mutually_exclusive_group()
            look.add_argument(
                "--preview",
                action="store_true",
                help="show which tokens are trained, here and as one HTML file, and what the linter finds; generates "
                "nothing: before the stage ran, answers are the source's own",
            )
            look.add_argument(
                "--verify", action="store_true", help="check every byte of the stored tokens and features"
            )
        if name == "eval":
            evaluate.add_options(sub)
        if name == "export":
            export.add_options(sub)
        if name == "extract":
            sub.add_argument(
                "--part",
                metavar="I/N",
                help="make only the I-th of N shares, beside processes that make the others in the same folder",
            )
    _add_plan(commands.add_parser("plan", help="what a run will need, before it runs: tokens, disk, memory, hours"))
    _add_chat(commands.add_parser("chat", help="talk to a target and see what its head drafts"))
    for module in MODULES:
        module.add(commands)
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", type=Path, help="the run's YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.description = (
        "Look at the data, measure this machine for some 20 seconds, and print what the run will need: tokens, disk "
        "for every codec, memory on each device, hours by stage, and the accepted length that known runs reached. "
        "Nothing is written."
    )
    sub.epilog = f"example: sstf plan {EXAMPLE} data.max_conversations=1000"
    _add_config(sub)
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    sub.add_argument("--no-calibration", action="store_true", help="do not load the target: hours stay unknown")


def _add_chat(sub: argparse.ArgumentParser) -> None:
    sub.description = (
        "Talk to a target and see what its head drafts: drafted and accepted tokens are coloured. Without a terminal, "
        "every line of the input is a message: the answers go to the output, all else to the error output."
    )
    sub.epilog = "example: sstf chat runs/demo --policy '{kind: dynamic, depth: 3, top_k: 4, total_tokens: 12}'"
    sub.add_argument(
        "head", metavar="HEAD", help="a head's folder, a run with one, or ngram or suffix: lookup without a head"
    )
    sub.add_argument("--target", metavar="NAME", help="embedded name, folder or hub id, if not where the head says")
    for option, metavar, text in CHAT_OPTIONS:
        sub.add_argument(option, metavar=metavar, help=text)
    sub.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    sub.add_argument(
        "--experience", metavar="FILE", type=Path, help="what decoding learned: loaded, and saved at the end"
    )
    sub.add_argument("--no-draft", action="store_true", help="decode plainly, to compare")


def run_command(args: argparse.Namespace) -> int:
    """Run one command; every error that a user can cause is one sentence on stderr."""
    err = Console(stderr=True)
    if args.work:
        return guarded(err, lambda: args.work(args, err), "interrupted")
    if args.command == "chat":
        return guarded(err, lambda: _chat(args, err), "interrupted")
    if args.command == "plan":
        return guarded(err, lambda: _plan(args, err), "interrupted")
    if args.command == "data" and args.preview:
        return guarded(err, lambda: _preview(args, err), "interrupted")
    if args.command == "data" and args.verify:
        return guarded(err, lambda: _verify(args, err), "interrupted")
    if args.command == "eval" and args.config.is_dir():
        return guarded(err, lambda: evaluate.evaluate_head(args, err), "interrupted")
    if args.command == "export" and (args.to or args.config.is_dir()):
        return guarded(err, lambda: export.export_head(args, err), "interrupted")
    return guarded(err, lambda: _execute(args, err))


def _execute(args: argparse.Namespace, err: Console) -> None:
    quiet_libraries()
    # Imported late: torch and transformers take seconds, and `--help` needs neither.
    from sstf.pipeline import load_run
    from sstf.progress_display import display

    old = evaluate.earlier(args) if args.command == "eval" else None
    run = load_run(args.config, args.overrides, display(err))
    wanted = COMMANDS[args.command][1]
    if args.command == "run" and not run.trains:
        wanted = ("eval",)
    if args.command == "extract" and args.part:
        from sstf.features import Part

        if not run.extract_part(Part.parse(args.part)):
            Console().print(f"part {args.part} is done; shards of other parts are missing", highlight=False)
            return
    else:
        run.up_to(*wanted)
    _show(run, wanted, Console())
    if old:
        folder = run.folder("eval")
        evaluate.show_against(old, json.loads((folder / "report.json").read_text("utf-8")), folder, Console())


def _plan(args: argparse.Namespace, err: Console) -> None:
    quiet_libraries()
    from sstf.pipeline import load_run
    from sstf.planning import make_plan, print_plan
    from sstf.progress_display import display

    plan = make_plan(load_run(args.config, args.overrides, display(err)), display(err), not args.no_calibration)
    out = Console()
    if args.json:
        out.print(Text(json.dumps(plan.to_json(), indent=2)), soft_wrap=True)
    else:
        print_plan(plan, out)


def _preview(args: argparse.Namespace, err: Console) -> None:
    quiet_libraries()
    from sstf.data.atomic import write_bytes_atomic
    from sstf.data.lint import lint, print_lint
    from sstf.data.preview import preview_html, print_preview
    from sstf.pipeline import load_run
    from sstf.progress_display import display

    run, out = load_run(args.config, args.overrides, display(err)), Console()
    samples, sources, final = run.samples()
    tokenizer, vocabulary = run.target.tokenizer, run.target.spec.vocab_size
    print_preview(out, samples, sources, tokenizer)
    print_lint(out, lint(samples, sources, tokenizer, run.config.data.max_length, vocabulary))
    what = "as trained" if final else "with the answers of the source, before the target writes its own"
    page = preview_html(samples, sources, tokenizer, f"{run.config.name}, {what}")
    path = (run.folder("data") if final else run.config.folder) / "preview.html"
    write_bytes_atomic(path, page.encode())
    out.print(Text(f"{len(samples):,} samples {what}"), soft_wrap=True)
    out.print(Text(f"{'preview':<15}{path}"), soft_wrap=True)


def _verify(args: argparse.Namespace, err: Console) -> None:
    quiet_libraries()
    from sstf.errors import DamagedDataError, DataError
    from sstf.pipeline import load_run
    from sstf.progress_display import display

    run, out = load_run(args.config, args.overrides, display(err)), Console()
    checked = run.verify()
    if not checked:
        raise DataError(f"nothing is stored for {args.config} yet; run `sstf data` or `sstf extract` first")
    for store in checked:
        out.print(
            Text(f"{'sound' if not store.faults else 'DAMAGED':<9}{store.folder}: {store.summary}"), soft_wrap=True
        )
    faults = [fault for store in checked for fault in store.faults]
    for fault in faults:
        complain(err, fault)
    if faults:
        raise DamagedDataError(f"{len(faults)} faults; what is whole is kept when the damaged files are made again")


def _chat(args: argparse.Namespace, err: Console) -> None:
    quiet_libraries()
    from sstf.chat import PROMPT, ChatConfig, converse, introduce, open_chat
    from sstf.config_loading import load_options

    given = {"policy", "temperature", "top_p", "top_k", "max_new_tokens", "seed"}
    config = load_options(ChatConfig, {name: text for name, text in vars(args).items() if name in given and text})
    interactive = sys.stdin.isatty()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # a byte that is no text must not end the chat
            stream.reconfigure(errors="replace")
    out = Console(highlight=False)
    notes = out if out.is_terminal else err
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing

    def read() -> str | None:
        if not interactive:
            return sys.stdin.readline() or None
        try:
            if out.is_terminal:
                return input(PROMPT)
            notes.print(PROMPT, end="")
            return input()
        except EOFError:
            notes.print()
            return None

    chat = open_chat(args.head, config, args.target, args.system, args.experience, not args.no_draft, notes)
    warnings.simplefilter("ignore")
    try:
        introduce(chat, out, notes, interactive)
        converse(chat, read, out, notes, interactive)
    finally:
        if args.experience:
            chat.decoder.experience.save(args.experience)


def _show(run: Run, wanted: Sequence[str], out: Console) -> None:
    if "data" in wanted:
        _show_data(run.data_report(), out)
    extracted = run.summary("extract") if "extract" in wanted else None
    if extracted:
        own = f"{extracted['argmax_share']:.1%} of the trained ones the target's first choice"
        out.print(Text(f"{extracted['tokens']:,} tokens, {own}"))
    evaluation = run.summary("eval") if "eval" in wanted else None
    if evaluation:
        out.print(results(evaluation["rows"]))
    for stage, inner, label in (
        ("data", "", "conversations"),
        ("extract", "", "features"),
        ("train", "head", "head"),
        ("train", "metrics.jsonl", "training log"),
        ("on_policy", "head", "on-policy head"),
        ("eval", "report.md", "report"),
        ("eval", "report.html", "page"),
        ("export", "", "for engines"),
    ):
        if stage in run.stages and run.summary(stage) is not None:
            # Not a table, which would break long paths to fit the terminal.
            out.print(Text(f"{label:<15}{run.folder(stage) / inner}"), soft_wrap=True)


def _show_data(report: dict[str, Any], out: Console) -> None:
    read, dropped = report["read"], report["dropped"]
    lines = [
        f"{report['kept']:,} samples, {report['tokens']:,} tokens, {report['mask_share']:.0%} of them trained",
        f"{read['read']:,} rows read, {read['kept']:,} usable"
        + "".join(
            f"; {count:,} {reason}"
            for counts in (read["skipped"], read["repaired"])
            for reason, count in counts.items()
        ),
        "dropped: " + (", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"),
        f"compared with the prompts of {', '.join(report['suites']) or 'no suite'}",
        f"cut at max_length: {report['cut_at_max_length']:,}; answers without an end: {report['unfinished_answers']:,}",
    ]
    if report["requests"]:
        distinct, nearest = report["requests"]["distinct_2"], report["requests"]["nearest_mean"]
        lines.append(f"requests: distinct-2 {distinct:.2f}, similarity to the nearest other {nearest:.2f}")
    coverage = ", ".join(f"{int(size):,}: {share:.1%}" for size, share in report["vocabulary_coverage"].items())
    lines.append(f"held-out tokens in a draft vocabulary of {coverage}")
    for line in lines:
        out.print(Text(line), soft_wrap=True)
