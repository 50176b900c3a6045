"""The command line: `sstf run CONFIG` and one command a stage. Thin: the work is in `pipeline`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.errors import SstfError

if TYPE_CHECKING:
    from sstf.pipeline import Run

EXAMPLE = "configs/smollm2-135m-instruct/demo.yaml"
COMMANDS = {
    "run": ("run every stage that is not done, in order, and print the results", ("eval", "export")),
    "data": ("conversations with the target's answers, as token ids and loss masks", ("data",)),
    "extract": ("hidden states of the target, as a feature store", ("extract",)),
    "train": ("train the head in this process (several: accelerate launch -m sstf.train CONFIG)", ("train",)),
    "eval": ("measure accepted length and speedup against the plain target", ("eval",)),
    "export": ("write the head in the forms that serving engines load", ("export",)),
}
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
    sys.exit(run_command(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sstf",
        description="Train draft heads that make a frozen language model decode faster without changing its words.",
        epilog=f"example: sstf run {EXAMPLE}",
    )
    parser.add_argument("--version", action="version", version=f"sstf {version('sstf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Stages that it needs and that are not done run first.",
            epilog=f"example: sstf {name} {EXAMPLE} train.learning_rate=3e-4",
        )
        sub.add_argument("config", type=Path, help="the run's YAML file")
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    _add_chat(commands.add_parser("chat", help="talk to a target and see what its head drafts"))
    return parser


def _add_chat(sub: argparse.ArgumentParser) -> None:
    sub.description = (
        "Talk to a target and see what its head drafts: drafted and accepted tokens are coloured. Without a terminal, "
        "every line of the input is a message: the answers go to the output, all else to the error output."
    )
    sub.epilog = "example: sstf chat runs/demo --policy '{kind: dynamic, depth: 3, top_k: 4, total_tokens: 12}'"
    sub.add_argument("head", metavar="HEAD", help="a head's folder, a run with one, or ngram: prompt lookup")
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
    if args.command == "chat":
        return guarded(err, lambda: _chat(args, err), "interrupted")
    return guarded(err, lambda: _execute(args, err))


def guarded(
    err: Console, work: Callable[[], None], interrupted: str = "interrupted; the same command goes on from here"
) -> int:
    """Run `work` and turn its errors into an exit code and one sentence."""
    try:
        work()
        return 0
    except SstfError as error:
        _complain(err, str(error))
        return error.exit_code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; free some space and run the command again: what is done is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"no permission to use {error.filename}; choose another output_dir or change the permission"
        else:
            raise
        _complain(err, what)
        return 2
    except KeyboardInterrupt:
        err.print(interrupted, highlight=False, soft_wrap=True)
        return 130


def _complain(err: Console, message: str) -> None:
    # As `Text`: rich would take brackets and colons in file names for markup.
    err.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def _execute(args: argparse.Namespace, err: Console) -> None:
    _quiet_libraries()
    # Imported late: torch and transformers take seconds, and `--help` needs neither.
    from sstf.pipeline import load_run
    from sstf.progress_display import display

    run = load_run(args.config, args.overrides, display(err))
    wanted = COMMANDS[args.command][1]
    if args.command == "run" and not run.trains:
        wanted = ("eval",)
    run.up_to(*wanted)
    _show(run, wanted, Console())


def _chat(args: argparse.Namespace, err: Console) -> None:
    _quiet_libraries()
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


def _quiet_libraries() -> None:
    """Bars and advice of the libraries below would drown our own."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _show(run: Run, wanted: Sequence[str], out: Console) -> None:
    evaluation = run.summary("eval") if "eval" in wanted else None
    if evaluation:
        out.print(_results(evaluation["rows"]))
    for stage, inner, label in (
        ("data", "", "conversations"),
        ("extract", "", "features"),
        ("train", "head", "head"),
        ("train", "metrics.jsonl", "training log"),
        ("eval", "report.md", "report"),
        ("export", "", "for engines"),
    ):
        if run.summary(stage) is not None:
            # Not a table, which would break long paths to fit the terminal.
            out.print(Text(f"{label:<15}{run.folder(stage) / inner}"), soft_wrap=True)


def _results(rows: list[dict[str, Any]]) -> Table:
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
