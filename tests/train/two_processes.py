"""Run by `accelerate launch`: trains on all the processes that it started. Arguments: features, then run folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_store import make_trainer, train_config

from sstf.data.progress import NoProgress
from sstf.features import FeatureStore
from sstf.train.parallel import close_launch


def main() -> None:
    torch.set_num_threads(1)
    store = FeatureStore(Path(sys.argv[1]))
    for folder in map(Path, sys.argv[2:]):
        trainer = make_trainer(store, folder, train_config(step_tokens=128))
        summary = trainer.run(NoProgress(), "tiny", {})
        if trainer.launch.is_main:
            (folder / "summary.json").write_text(json.dumps(summary))
    close_launch()


if __name__ == "__main__":
    main()
