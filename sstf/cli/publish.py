"""`sstf publish HEAD|CONFIG --repo OWNER/NAME`: a head with its card, checked, as one commit on a model hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sstf.cli.guard import complain, quiet_libraries


def add(commands: Any) -> None:
    """The command's parser."""
    sub = commands.add_parser("publish", help="put a head with a model card on a model hub")
    sub.description = (
        "Write the folder that is published (the head, its forms for engines, a model card from what the run "
        "recorded), check it, and send it to a model hub as one commit. The key is that of `hf auth login` or "
        "HF_TOKEN; HF_ENDPOINT names another hub. Exit code 1: a check failed, and nothing was published."
    )
    sub.epilog = "example: sstf publish runs/demo --repo me/smollm2-eagle3 --dry-run"
    sub.add_argument("subject", metavar="HEAD|CONFIG", help="a head's folder, a run with one, or a run's YAML file")
    sub.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where to on the hub")
    sub.add_argument("--dry-run", action="store_true", help="write and check the folder, and send nothing")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the folder (default: published/NAME)")
    sub.add_argument("--update", action="store_true", help="replace what was published in OWNER/NAME before")
    sub.add_argument("--private", action="store_true", help="a repository that is made is not shown to others")
    sub.add_argument(
        "--license", metavar="NAME", help="of the head, in the hub's words (default: the target's, if known)"
    )
    sub.add_argument("--base-model", metavar="ID", help="the target's name on the hub, if the head does not know it")
    sub.add_argument("--target", metavar="NAME", help="where the target is now, if not where the head says")
    sub.add_argument("--force", action="store_true", help="publish though a check failed; the card says so")
    sub.set_defaults(work=run)


def run(args: argparse.Namespace, err: Console) -> int:
    """Exit code 1 when a check failed."""
    quiet_libraries()
    from sstf.progress_display import display
    from sstf.publish.folder import Publication, make_folder
    from sstf.publish.hub import check_name, connect, look, send

    check_name(args.repo)
    api = None if args.dry_run else connect()
    if api is not None:
        look(api, args.repo, args.update)  # before minutes of checks
    head, evaluation = _subject(args.subject, err)
    out = args.out or Path("published") / args.repo.rpartition("/")[2]
    asked = Publication(head, args.repo, evaluation, args.base_model, args.license, args.target, force=args.force)
    verdicts = make_folder(asked, out, display(err))
    console = Console(highlight=False)
    for verdict in verdicts:
        word = Text("pass", "green") if verdict.passed else Text("FAIL", "bold red")
        console.print(Text.assemble(word, f" {verdict.name}: {verdict.detail}"), soft_wrap=True)
    if any(not verdict.passed for verdict in verdicts) and not args.force:
        complain(err, "a check failed, so nothing was published; see above, or --force to publish all the same")
        return 1
    console.print(Text(f"{'folder':<15}{out}"), soft_wrap=True)
    if api is not None:
        address = send(api, args.repo, out, args.update, args.private, lambda text: err.print(Text(text)))
        console.print(Text(f"{'published':<15}{address}"), soft_wrap=True)
    return 0


def _subject(name: str, err: Console) -> tuple[Path, Path | None]:
    """The head's folder, and of a configuration its own evaluation."""
    from sstf.errors import ConfigError
    from sstf.formats import find_head
    from sstf.pipeline import load_run
    from sstf.progress_display import display

    if Path(name).suffix not in (".yaml", ".yml"):
        return find_head(name), None
    run = load_run(Path(name), [], display(err))
    if not run.trains:
        raise ConfigError(f"{name}: method.kind={run.config.method.kind} trains no head that could be published")
    if run.summary(run.head_stage) is None:
        raise ConfigError(f"{name}: its head is not trained yet; run `sstf run {name}` first")
    evaluated = run.folder("eval") if run.summary("eval") is not None else None
    return run.head, evaluated
