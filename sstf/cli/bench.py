"""`sstf bench --baseline URL --candidate URL`: two servers under the same requests, see `sstf.bench`."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries

if TYPE_CHECKING:
    from sstf.bench.run import BenchSettings, Side

SIDES = ("baseline", "candidate")
UNITS = {"ms": 1e-3, "s": 1.0}


def add(commands: Any) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "bench",
        help="two OpenAI-compatible servers under the same requests: latency, throughput, acceptance, go or no-go",
        description="Send the same requests to two OpenAI-compatible servers, in turns, and compare latency, "
        "throughput, acceptance and use of the machine. With --shadow, replay recorded requests, and with --mirror "
        "copy live ones: compare the answers, and advise. Exit code 1: a server went away, so that the report is "
        "partial, or the advice is no-go.",
        epilog="example: sstf bench --baseline http://127.0.0.1:8000 --candidate http://127.0.0.1:8001 "
        "--concurrency 1,2,4 --objective ttft=500ms,itl=50ms",
    )
    for side in SIDES:
        parser.add_argument(f"--{side}", metavar="URL", required=True, help=f"the {side}'s address")
    for side in SIDES:
        parser.add_argument(f"--{side}-model", metavar="NAME", help="where it serves several")
        parser.add_argument(f"--{side}-key-env", metavar="VARIABLE", help="environment variable with its API key")
        parser.add_argument(
            f"--{side}-pid", metavar="PID", type=_positive, help="its process, if not who listens there"
        )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--suite", metavar="NAME", help="of prompts, see sstf eval (default: builtin)")
    source.add_argument("--prompts", metavar="FILE", help="prompts of your own, JSONL with `prompt` or `messages`")
    source.add_argument(
        "--shadow", metavar="FILE", type=Path, help="recorded requests, JSONL: sent as they are, answers compared"
    )
    source.add_argument(
        "--mirror",
        metavar="PORT",
        type=_port,
        help="serve the baseline's clients here and send copies to the candidate",
    )
    parser.add_argument("--record", metavar="FILE", type=Path, help="add the requests of --mirror to this file")
    parser.add_argument("--concurrency", metavar="N[,N...]", type=_several, help="users, one load each (default: 1)")
    parser.add_argument(
        "--arrival", metavar="KIND", default="closed", help="closed (default), poisson:RATE[,RATE...] or trace:FILE"
    )
    parser.add_argument(
        "--requests", metavar="N", type=_positive, help="a load (default: 32; all recorded or mirrored ones)"
    )
    parser.add_argument("--max-tokens", metavar="N", type=_positive, help="an answer (default: 128)")
    parser.add_argument("--temperature", metavar="T", type=_not_negative, help="(default: 0)")
    parser.add_argument(
        "--objective", metavar="M=T[,...]", type=_objective, help="for goodput, such as ttft=500ms,itl=50ms,tpot,e2e"
    )
    parser.add_argument(
        "--limit",
        metavar="NAME=X",
        action="append",
        default=[],
        help="of the advice of --shadow and --mirror, such as identical=0.95",
    )
    parser.add_argument("--rounds", metavar="N", type=_positive, default=4, help="turns a load (default: 4)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of Poisson arrivals (default: 0)")
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=600.0, help="of silence (default: 600)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the whole report")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write it as a page, with plots")
    parser.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> int:
    """1 for a partial report or a no-go."""
    quiet_libraries()
    try:
        from sstf.bench.page import page
        from sstf.bench.run import bench
    except ModuleNotFoundError as error:
        from sstf.errors import ConfigError

        raise ConfigError(f"sstf bench needs {error.name}; install it with: pip install 'sstf[engines]'") from None
    from sstf.data.atomic import write_bytes_atomic, write_json_atomic

    report = bench(_settings(args), lambda line: err.print(Text(line), soft_wrap=True))
    out = Console()
    report.print(out)
    if args.json:
        write_json_atomic(args.json, report.to_json())
        out.print(Text(f"{'report':<15}{args.json}"), soft_wrap=True)
    if args.html:
        write_bytes_atomic(args.html, page(report).encode())
        out.print(Text(f"{'page':<15}{args.html}"), soft_wrap=True)
    return 0 if report.good else 1


def _settings(args: argparse.Namespace) -> BenchSettings:
    from sstf.bench.run import BenchSettings
    from sstf.bench.shadow import Limits
    from sstf.config_loading import load_options
    from sstf.errors import ConfigError

    advised = args.shadow is not None or args.mirror is not None
    if advised and (args.max_tokens or args.temperature is not None):
        raise ConfigError("--max-tokens and --temperature are for suites; others' requests are sent as they are")
    if args.mirror is not None and (args.concurrency or args.arrival != "closed"):
        raise ConfigError("--concurrency and --arrival do not apply to --mirror, whose clients ask when they like")
    if args.record and args.mirror is None:
        raise ConfigError("--record is for --mirror, whose requests it keeps")
    if args.limit and not advised:
        raise ConfigError("--limit is for the advice of --shadow and --mirror")
    limits = {}
    for text in args.limit:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--limit {text}: expected NAME=NUMBER, such as identical=0.95")
        limits[name] = value
    return BenchSettings(
        baseline=_side(args, "baseline"),
        candidate=_side(args, "candidate"),
        suite=args.suite or args.prompts or "builtin",
        shadow=args.shadow,
        mirror=args.mirror,
        record=args.record,
        concurrency=args.concurrency,
        arrival=args.arrival,
        requests=args.requests,
        max_tokens=args.max_tokens or 128,
        temperature=args.temperature or 0.0,
        objective=args.objective,
        limits=load_options(Limits, limits),
        rounds=args.rounds,
        seed=args.seed,
        timeout_s=args.timeout,
    )


def _side(args: argparse.Namespace, name: str) -> Side:
    from sstf.bench.run import Side

    given = vars(args)
    return Side(given[name], given[f"{name}_model"], given[f"{name}_key_env"], given[f"{name}_pid"])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise ValueError(text)
    return value


def _several(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _objective(text: str) -> dict[str, float]:
    """`ttft=500ms,e2e=5s` in seconds."""
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(ttft|itl|tpot|e2e)=(\d+(?:\.\d+)?)(ms|s)", part)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no objective; expected ttft, itl, tpot or e2e, as ttft=500ms"
            )
        found[match[1]] = float(match[2]) * UNITS[match[3]]
    return found
