"""`sstf serve HEAD|ngram`: an OpenAI-compatible server over the project's own decoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sstf.cli.guard import quiet_libraries

# Checked by `serve.ServeConfig`, whose defaults these texts repeat.
OPTIONS = (
    ("--host", "ADDRESS", "where to listen; any other than loopback needs --api-key-env (default: 127.0.0.1)"),
    ("--port", "N", "0 takes a free one (default: 8000)"),
    ("--api-key-env", "NAME", "environment variable with the keys that clients must send, separated by commas"),
    ("--policy", "YAML", "how to draft (default: a cost-aware tree with lookup)"),
    ("--slots", "N", "requests decoded at once (default: 4)"),
    ("--queue", "N", "requests that may wait; more are told to come back, with 429 (default: 256)"),
    ("--context", "N", "tokens of a prompt and its answer together (default: the target's, at most 4096)"),
    ("--max-new-tokens", "N", "the longest answer, and the usual one (default: as the context allows)"),
    ("--grace", "SECONDS", "for running answers when the server is told to stop (default: 20)"),
)


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("serve", help="serve a target and its head to OpenAI's clients")
    sub.description = (
        "Serve a target with its head as OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, and /health "
        "and /metrics (Prometheus). Requests are decoded side by side and wait in turn, client by client. Ctrl-C or "
        "SIGTERM ends it: running answers get some seconds more."
    )
    sub.epilog = "example: sstf serve runs/demo --port 8000"
    sub.add_argument(
        "head", metavar="HEAD", help="a head's folder, a run with one, or ngram or suffix: lookup without a head"
    )
    sub.add_argument("--target", metavar="NAME", help="embedded name, folder or hub id, if not where the head says")
    for option, metavar, text in OPTIONS:
        sub.add_argument(option, metavar=metavar, help=text)
    sub.add_argument(
        "--experience", metavar="FILE", type=Path, help="what decoding learned: loaded, and saved at the end"
    )
    sub.add_argument("--no-draft", action="store_true", help="decode plainly, to compare")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> None:
    """Serve until a signal."""
    quiet_libraries()
    from sstf.config_loading import load_options
    from sstf.errors import ConfigError

    try:
        from sstf.serve import ServeConfig, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(
            f"{error.name} is not installed; `pip install 'sstf[serve]'` brings what serving needs"
        ) from None

    names = [option[2:].replace("-", "_") for option, _, _ in OPTIONS]
    config = load_options(ServeConfig, {name: text for name in names if (text := getattr(args, name)) is not None})
    serve(args.head, config, args.target, args.experience, not args.no_draft, err)
