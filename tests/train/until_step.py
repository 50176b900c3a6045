"""Run by `accelerate launch`: train a run on to a step, save, and leave. Arguments: features, run folder, step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_store import make_trainer, train_config

from sstf.features import FeatureStore
from sstf.train.parallel import close_launch


def main() -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(FeatureStore(Path(sys.argv[1])), Path(sys.argv[2]), train_config(step_tokens=128))
    while trainer.progress.step < int(sys.argv[3]):
        trainer.train_step()
    trainer._checkpoint()
    print(trainer.launch.facts())
    close_launch()


if __name__ == "__main__":
    main()
