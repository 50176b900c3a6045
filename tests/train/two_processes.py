"""Run by `accelerate launch`: trains on all the processes that it started. Arguments: features, then run folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_store import make_trainer, train_config

from sstf.data.progress import NoProgress
from sstf.features import FeatureStore


def main() -> None:
    torch.set_num_threads(1)
    store = FeatureStore(Path(sys.argv[1]))
    for folder in map(Path, sys.argv[2:]):
        trainer = make_trainer(store, folder, train_config(batches_per_step=2))
        assert trainer.accelerator.num_processes == 2
        assert torch.distributed.get_backend() == "gloo"
        assert isinstance(trainer.wrapped, torch.nn.parallel.DistributedDataParallel)
        summary = trainer.run(NoProgress(), "tiny", {})
        if trainer.accelerator.is_main_process:
            (folder / "summary.json").write_text(json.dumps(summary))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
