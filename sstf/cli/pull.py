"""`sstf pull OWNER/NAME`: a head from a model hub, whole and checked, or not at all."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("pull", help="fetch a head from a model hub")
    sub.description = (
        "Fetch a head from a model hub, check every byte, and say which target it is for. Pickles are not fetched. "
        "`sstf chat`, `sstf eval` and `sstf doctor` take the folder."
    )
    sub.epilog = "example: sstf pull me/smollm2-eagle3"
    sub.add_argument("repo", metavar="OWNER/NAME", help="where it is on the hub")
    sub.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: NAME)")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> None:
    """Print where the head is and for which target."""
    quiet_libraries()
    from sstf.methods.checkpoint import read_head
    from sstf.publish.hub import check_name, connect, fetch

    check_name(args.repo)
    out = args.out or Path(args.repo.rpartition("/")[2])
    fetched = fetch(connect(anonymous=True), args.repo, args.revision, out, lambda text: err.print(Text(text)))
    console = Console(highlight=False)
    console.print(Text(f"{'head':<15}{fetched.folder}"), soft_wrap=True)
    console.print(Text(f"{'commit':<15}{fetched.commit}"), soft_wrap=True)
    if (out / "head.json").is_file():
        target = read_head(out).target
        console.print(Text(f"{'target':<15}{target.name} ({target.dtype}, {target.fingerprint})"), soft_wrap=True)
    else:
        named = fetched.base_model or "not named; say --target NAME where you use it"
        console.print(Text(f"{'target':<15}{named}"), soft_wrap=True)
