"""The worker that a launcher starts once per process:

    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m sstf.train CONFIG [key.sub=value ...]

The features must be there (`sstf extract CONFIG`); after it, `sstf run CONFIG` goes on with evaluation and export.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from sstf.cli.guard import guarded
from sstf.data.progress import NoProgress, Progress
from sstf.errors import ConfigError
from sstf.pipeline import load_run
from sstf.progress_display import display
from sstf.train.parallel import close_launch


def main() -> int:
    """Train in this process, one of several; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sstf.train",
        description="Train the head of a run on all the processes that a launcher started.",
        epilog="example: accelerate launch --config_file configs/accelerate/cpu-2.yaml "
        "-m sstf.train configs/smollm2-135m-instruct/demo.yaml",
    )
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    args = parser.parse_args()
    err = Console(stderr=True)
    # One display is enough: every process would draw the same bars.
    progress: Progress = display(err) if os.environ.get("RANK", "0") == "0" else NoProgress()
    return guarded(err, lambda: _train(args.config, args.overrides, progress))


def _train(path: Path, overrides: list[str], progress: Progress) -> None:
    if "WORLD_SIZE" not in os.environ:
        # `accelerate launch --cpu --num_processes 2` does this, and nothing tells us that two were asked for.
        raise ConfigError(
            "the launcher started this process alone; for several processes give it a configuration such as "
            "configs/accelerate/cpu-2.yaml, for one process use `sstf train`"
        )
    load_run(path, overrides, progress).train_only()
    close_launch()


if __name__ == "__main__":
    raise SystemExit(main())
