"""`sstf dashboard [RUN_DIR...] [--engine URL...]`: the live page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("dashboard", help="watch trainings, evaluations and live engines in a web page")
    sub.description = (
        "Serve a live web page of training runs, their evaluations, engines (vLLM, SGLang, sstf serve) and this "
        "machine. It needs no network and changes nothing that it watches. Ctrl-C ends it."
    )
    sub.epilog = (
        "example: sstf dashboard runs/demo --engine plain=http://127.0.0.1:8000 --engine head=http://127.0.0.1:8001"
    )
    sub.add_argument("runs", nargs="*", metavar="RUN_DIR", type=Path, help="folders of runs, finished or not yet begun")
    sub.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="an engine with /metrics; give it again for more: others are compared with the first",
    )
    sub.add_argument(
        "--band",
        metavar="LOW:HIGH",
        help="accepted lengths of the engines that raise no alarm (default: learnt from each one's first minutes)",
    )
    sub.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: %(default)s)")
    sub.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s, this machine alone)")
    sub.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with a key that the page asks for; wanted where --host is not loopback",
    )
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> None:
    """Until it is stopped."""
    from sstf.errors import ConfigError

    try:
        from sstf.dashboard.alarms import Band
        from sstf.dashboard.app import serve
        from sstf.dashboard.board import Board
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; run `pip install sstf[dashboard]`") from None
    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise ConfigError(f"--api-key-env {args.api_key_env}: the variable is empty or not set; put a key into it")
    board = Board(args.runs, args.engine, Band.parse(args.band) if args.band else None)
    out = Console()
    serve(
        board,
        args.host,
        args.port,
        key,
        lambda url: out.print(Text(f"dashboard at {url} (Ctrl-C ends it)"), soft_wrap=True),
    )
