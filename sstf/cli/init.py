"""`sstf init --target T --method M`: a commented configuration that `sstf plan` and `sstf run` take as it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("init", help="write a commented configuration for a target and a method")
    sub.description = (
        "Write a configuration for a target and a method: the settings that people change, each with what it means and "
        "a value that suits the two; or say why the method cannot draft for the target. The target's weights are not "
        "read. Without --method: which methods there are."
    )
    sub.epilog = "example: sstf init --target smollm2-135m-instruct --method medusa -o medusa.yaml"
    sub.add_argument("--target", metavar="NAME", help="an embedded name, a local folder or a hub id")
    sub.add_argument("--method", metavar="KIND", help="how to draft")
    sub.add_argument("-o", "--out", type=Path, metavar="FILE", help="the file to write (default: TARGET-KIND.yaml)")
    sub.add_argument("--force", action="store_true", help="write over a file that is there")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> None:
    """Write the file, or list the methods."""
    quiet_libraries()
    from sstf.data.atomic import write_bytes_atomic
    from sstf.errors import ConfigError, SstfError
    from sstf.methods import METHODS
    from sstf.starter import description, read_target, suit, write_config

    out = Console(highlight=False)
    if args.method is None:
        target = read_target(args.target) if args.target else None
        for kind in METHODS:
            out.print(Text(f"{kind:<15}{description(kind)}"), soft_wrap=True)
            try:
                if target:
                    suit(kind, target)
            except SstfError as error:
                out.print(Text(f"{'':<15}not for {target.spec.name if target else ''}: {error}"), soft_wrap=True)
        return
    if args.target is None:
        raise ConfigError(f"method {args.method} needs a target to be set up for; add --target NAME")
    starter = suit(args.method, read_target(args.target))
    path: Path = args.out or Path(f"{starter.target.spec.name}-{args.method}.yaml")
    if path.is_dir() or (path.exists() and not args.force):
        hint = "name a file in it" if path.is_dir() else "name another file, or write over it with --force"
        raise ConfigError(f"{path} is there already; {hint}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, write_config(args.target, starter).encode())
    out.print(Text(f"{'configuration':<15}{path}"), soft_wrap=True)
    out.print(Text(f"{'next':<15}sstf plan {path}"), soft_wrap=True)
