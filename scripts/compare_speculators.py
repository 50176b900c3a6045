"""The half of the comparison that runs in the environment of speculators 0.9.0; `compare_speculators.sh` makes that
environment and `bench_train.py --against-speculators` calls this.

    python scripts/compare_speculators.py patch                 # once: makes the installed copy run on a CPU
    python scripts/compare_speculators.py dataset FOLDER        # rows.json -> the Arrow data set it reads
    python scripts/compare_speculators.py train WARM_UP STEPS [options of `speculators train`]

`train` runs speculators' own command with its own data loader, model, loss, clipping and optimiser. Only the outermost
loop is replaced: it runs one epoch without saving a checkpoint or validating, and takes the time after each step.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

VERSION = "0.9.0"

# Where speculators/train/trainer.py takes an accelerator for granted: (text, replacement, how often it occurs).
PATCHES = (
    # The model and every batch go to device number `local_rank`, which is CUDA's first.
    ("self.local_rank = get_local_rank()", 'self.local_rank = "cpu"', 1),
    # autocast would be of CUDA, and on a CPU train in float32.
    ('acc.type if acc is not None else "cuda"', 'acc.type if acc is not None else "cpu"', 1),
    # The timer of the logged steps waits for a device that is not there.
    (
        "        torch.accelerator.synchronize()",
        "        torch.accelerator.is_available() and torch.accelerator.synchronize()",
        2,
    ),
)


def patched(source: str) -> str:
    """The trainer's source with all `PATCHES`; one that is patched already comes back as it is.

    Raises:
        ValueError: it is not the text that the patches were written for.
    """
    for old, new, count in PATCHES:
        if source.count(new) == count:
            continue
        if source.count(old) != count:
            raise ValueError(f"{old.strip()!r} was found {source.count(old)} times, expected {count}")
        source = source.replace(old, new)
    return source


def patch() -> None:
    """Patch the installed copy, found without importing it."""
    version = importlib.metadata.version("speculators")
    spec = importlib.util.find_spec("speculators")
    if version != VERSION or spec is None or spec.origin is None:
        raise SystemExit(f"found speculators {version}, expected {VERSION}; make its environment anew")
    path = Path(spec.origin).parent / "train" / "trainer.py"
    try:
        path.write_text(patched(path.read_text()))
    except ValueError as error:
        raise SystemExit(f"{path} is not that of speculators {VERSION}: {error}") from None


def dataset(folder: Path) -> None:
    """Write the Arrow data set beside the hidden states."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    # It insists on a validation set, which comes last; it is never read here, so no hidden states belong to it.
    rows.append(rows[0])
    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "loss_mask": [row["loss_mask"] for row in rows],
        "seq_len": [len(row["input_ids"]) for row in rows],
    }
    data = Dataset.from_dict(columns)
    data.set_format("torch")
    data.save_to_disk(str(folder))


def memory(key: str) -> float:
    """VmRSS or VmHWM of this process in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return round(int(line.split()[1]) / 2**20, 3)
    raise RuntimeError(f"this system does not report {key}")


def train(warm_up: int, steps: int, arguments: list[str]) -> None:
    """Train and print the figures of the last `steps` as one JSON line."""
    stages = {"python": memory("VmRSS")}
    import torch

    stages["torch"] = memory("VmRSS")
    from speculators.train import cli
    from speculators.train.config import TrainConfig

    stages["imports"] = memory("VmRSS")
    after_import = memory("VmHWM")

    logged: list[dict[str, Any]] = []
    metrics = logging.Handler()
    metrics.emit = lambda record: logged.append(record.msg)  # type: ignore[method-assign]

    def run_training(trainer: Any) -> None:
        stages["trainer"] = memory("VmRSS")
        logging.getLogger("speculators.metrics").addHandler(metrics)
        ends: list[tuple[float, float]] = []
        trainer.train_epoch(0, step_callback=lambda: ends.append((time.perf_counter(), time.process_time())))
        if len(ends) != warm_up + steps:
            raise SystemExit(f"speculators trained {len(ends)} steps, expected {warm_up + steps}")
        seconds, cpu_seconds = (last - first for first, last in zip(ends[warm_up - 1], ends[-1], strict=True))
        losses = [step["train"]["loss_0"] for step in logged]
        waited = sum(step["profile"]["fetch_ms"] for step in logged[warm_up:]) / 1000
        print(
            json.dumps(
                {
                    "seconds_a_step": round(seconds / steps, 4),
                    "cpu_seconds_a_step": round(cpu_seconds / steps, 4),
                    "waited_for_data": round(waited, 3),
                    "loss_of_step_0": [round(losses[warm_up - 1], 3), round(losses[-1], 3)],
                    "threads": torch.get_num_threads(),
                    "peak_rss_gib": memory("VmHWM"),
                    "rss_after_import_gib": after_import,
                    "rss_gib": stages,
                }
            ),
            flush=True,
        )

    cli.Trainer.run_training = run_training
    cli.main(TrainConfig.resolve([*arguments, "--max-steps", str(warm_up + steps)]))


def main() -> None:
    if sys.argv[1:] == ["patch"]:
        patch()
    elif len(sys.argv) == 3 and sys.argv[1] == "dataset":
        dataset(Path(sys.argv[2]))
    elif len(sys.argv) > 4 and sys.argv[1] == "train":
        train(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
