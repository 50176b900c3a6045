"""`sstf tune HEAD|CONFIG`: how to serve a head on this machine, from measured costs and acceptance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("tune", help="choose depth, width and tokens by batch size, from what is measured here")
    sub.description = (
        "Measure what a head accepts and what its passes cost at each batch size and context length; print the draft "
        "that promises most tokens a second, launch lines for vLLM and SGLang, and up to which batch drafting pays. "
        "Costs are of this decoder: confirm on the engine with `sstf bench`."
    )
    sub.epilog = "example: sstf tune runs/demo batches=[1,4,16] contexts=[128,1024] --out tuned"
    sub.add_argument("subject", metavar="HEAD|CONFIG", help="a head's folder, a run with one, or a run's YAML file")
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="suite, prompts, max_new_tokens, batches, contexts, repeats",
    )
    sub.add_argument("--target", metavar="NAME", help="of a head: its target, if not where the head says")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write tune.json and the figure tune there")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> int:
    """Exit code 1 where drafting pays at no measured batch size."""
    quiet_libraries()
    from sstf.config_loading import load_options
    from sstf.errors import ConfigError
    from sstf.formats import find_head, read_any, target_of
    from sstf.methods.checkpoint import for_decoding
    from sstf.pipeline import load_run
    from sstf.progress_display import display
    from sstf.targets import EMBEDDED, locate
    from sstf.tune import TuneConfig, launch_lines, measure, plan, print_plan, write_plan

    settings = {}
    for override in args.overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: expected a setting such as batches=[1,4,16]")
        settings[key] = value
    config = load_options(TuneConfig, settings)
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"{args.out} is no folder; --out names one for the plan")
    progress = display(err)
    if Path(args.subject).suffix in (".yaml", ".yml"):
        if args.target:
            raise ConfigError("--target is for a head's folder; a configuration names its target itself")
        trained = load_run(Path(args.subject), [], progress)
        trained.up_to(trained.head_stage)
        folder, target = trained.head, trained.target
    else:
        folder = find_head(args.subject)
        target = target_of(folder, args.target)
    stored = read_any(folder, target.spec)
    measured = measure(target, for_decoding(stored, target, str(folder)), config, progress)
    found = plan(measured)
    name = target.spec.name
    model = str(locate(name)) if name in EMBEDDED else name
    commands = launch_lines(found, model, str(folder), stored.config.kind)
    out = Console()
    print_plan(found, measured, commands, out)
    if args.out:
        shown = write_plan(args.out, found, measured, commands, progress.note)
        out.print(Text(f"{'plan':<15}{args.out / 'tune.json'}"), soft_wrap=True)
        out.print(Text(f"{'figure':<15}{shown}"), soft_wrap=True)
    return 0 if any(found.break_even.values()) else 1
