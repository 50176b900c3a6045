"""`sstf parity HEAD`: the parity ladder, see `sstf.parity.ladder`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "parity",
        help="whether a head behaves in the decoder, in its exports and in vLLM as it did in training",
        description="Take one prompt set through the head as it was trained, as it is read back, as every engine is "
        "given it and, where asked, through vLLM itself; at each rung name the first tensor that differs. Ends with 1 "
        "where a rung does not hold.",
        epilog="example: sstf parity runs/demo --vllm .venv-vllm",
    )
    parser.add_argument("head", metavar="HEAD", help="a head's folder, or a run with one")
    parser.add_argument("--target", metavar="NAME", help="embedded name, folder or hub id, if not where the head says")
    parser.add_argument("--exported", metavar="DIR", type=Path, help="check these files in place of fresh exports")
    parser.add_argument("--vllm", metavar="VENV", type=Path, help="a virtual environment with vLLM, for the last rung")
    parser.add_argument("--prompts", metavar="N", type=_positive, default=8, help="of the built-in suite (default: 8)")
    parser.add_argument("--max-new-tokens", metavar="N", type=_positive, default=64, help="an answer (default: 64)")
    parser.add_argument("--depth", metavar="N", type=_positive, help="drafts a pass (default: what training unrolled)")
    parser.add_argument("--json", action="store_true", help="print the rungs as JSON")
    parser.set_defaults(work=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def run(args: argparse.Namespace, err: Console) -> int:
    """Climb, and say what was found; 1 where a rung does not hold."""
    quiet_libraries()
    from sstf.formats import find_head, target_of
    from sstf.parity.ladder import ParitySettings, climb, training_precision
    from sstf.progress_display import display

    folder = find_head(args.head)
    target = target_of(folder, args.target)
    settings = ParitySettings(
        prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        depth=args.depth,
        exported=args.exported,
        vllm=args.vllm,
    )
    parity = climb(folder, target, settings, training_precision(folder), display(err))
    out = Console()
    if args.json:
        out.print(Text(json.dumps(parity.to_json(), indent=2)), soft_wrap=True)
    else:
        parity.print(out)
    return 0 if parity.passed else 1
