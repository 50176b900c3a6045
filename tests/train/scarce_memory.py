"""A process that trains with little memory left. Arguments: features, run folder, JSON.

JSON: `left`, MiB that it may still take when training begins (null for no limit); `loss_rows` and the `least` of them;
`config`. Prints JSON: what was noted, what came of it, and the sizes at the end.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_store import train_config

from sstf.data.progress import NoProgress
from sstf.errors import ConfigError
from sstf.features import FeatureStore
from sstf.methods import Eagle3Config, Eagle3Method
from sstf.train import trainer as trainer_module


class Notes(NoProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """Remember it."""
        self.said.append(text)


def limit(left: int) -> None:
    """Let this process take so many MiB more, and no more."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    most = int(line.split()[1]) * 1024 + left * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    torch.set_num_threads(1)
    asked: dict[str, Any] = json.loads(sys.argv[3])
    method = Eagle3Method(Eagle3Config(ttt_steps=3, draft_vocab_size=32768))
    method.loss_rows, trainer_module.LEAST_LOSS_ROWS = asked["loss_rows"], asked["least"]
    config = train_config(validation_conversations=0, **asked["config"])
    trainer = trainer_module.Trainer(
        FeatureStore(Path(sys.argv[1])), method, method.config, config, Path(sys.argv[2]), 0
    )
    if asked["left"] is not None:
        limit(asked["left"])
    notes, error = Notes(), None
    try:
        trainer.run(notes, "scarce", {})
    except ConfigError as found:
        error = str(found)
    print(
        json.dumps(
            {
                "said": notes.said,
                "error": error,
                "steps": trainer.progress.step,
                "tokens": trainer.feed.batch_tokens,
                "loss_rows": method.loss_rows,
            }
        )
    )


if __name__ == "__main__":
    main()
