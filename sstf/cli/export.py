"""`sstf export HEAD --to ENGINE`: one head, from any form to any."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import quiet_libraries
from sstf.errors import ConfigError, TargetError

ENGINES = ("vllm", "sglang", "speculators", "transformers")
WRITTEN = {"config.json", "model.safetensors"}


def add_options(sub: argparse.ArgumentParser) -> None:
    """What `sstf export` takes beside a configuration."""
    sub.description = (
        "Write a head in the forms that serving engines load, and read each back. Of a run: the stages that it needs "
        "and that are not done run first, and export.engines are written. Of a head in any form: the one of --to."
    )
    sub.epilog = f"{sub.epilog}; of a head: sstf export runs/demo --to vllm --out head-for-vllm"
    sub.add_argument("--to", choices=ENGINES, help="CONFIG is a head instead: its folder, or a run with one")
    sub.add_argument("--out", type=Path, metavar="DIR", help="with --to: where (default: beside the head)")
    sub.add_argument(
        "--target", metavar="NAME", help="with --to: the target of a published head; in speculators' form its name"
    )


def export_head(args: argparse.Namespace, err: Console) -> None:
    """Export what `args.config` names to `args.to`.

    Raises:
        ConfigError: options that do not go together, or a folder that holds something else.
        SstfError: the head cannot be read or exported.
    """
    if not args.to:
        raise ConfigError(
            f"{args.config} is a folder; to export a head, say --to {', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        )
    if args.overrides:
        raise ConfigError(f"with --to a head is exported, which has no setting {args.overrides[0]}; leave it out")
    quiet_libraries()
    from sstf.formats import Engine, find_head, needs_target, read_any, target_for, target_of
    from sstf.formats import export_head as write_export
    from sstf.methods.checkpoint import check_embeddings, read_head
    from sstf.targets import EMBEDDED, locate

    assert get_args(Engine) == ENGINES
    folder = find_head(str(args.config))
    out: Path = args.out or folder.with_name(f"{folder.resolve().name}-{args.to}")
    if out.resolve() == folder.resolve() or (out.exists() and not _may_be_replaced(out)):
        raise ConfigError(f"{out} holds something else than an earlier export; choose another folder with --out")
    frozen = None
    if (folder / "head.json").is_file():
        stored = read_head(folder)
        if needs_target(stored.config.kind, args.to):
            with suppress(TargetError):  # the sentences say what the form lacks then
                frozen = target_for(folder, stored.target).frozen_head
    else:
        target = target_of(folder, args.target)
        stored = read_any(folder, target.spec)
        check_embeddings(stored, target.frozen_head)
        frozen = target.frozen_head
    # Others load the target by its folder: an embedded name means nothing to them.
    verifier = locate(args.target) if args.target in EMBEDDED else args.target
    sentences = write_export(stored, args.to, out, verifier, frozen)
    console = Console()
    console.print(Text(f"{'for ' + args.to:<17}{out}"), soft_wrap=True)
    for sentence in sentences:
        console.print(Text(sentence), soft_wrap=True)


def _may_be_replaced(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= WRITTEN
