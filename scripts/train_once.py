"""One training in a process of its own, for `bench_train.py`: prints its figures as one JSON line.

    python scripts/train_once.py STORE --ttt-steps 3 --steps 12

Imports what a training imports and nothing more, so that the resident memory is a training's. `rss_gib` says where
the memory goes: resident after each stage, freed memory given back; then, in one more step, the highest point of the
forward pass (loss included), what is kept of it for the backward pass, and the highest point of the rest of the step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path


def memory(key: str = "VmRSS") -> float:
    """Resident memory of this process in GiB; `VmHWM` is its peak (`ru_maxrss` is inherited from the parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return round(int(line.split()[1]) / 2**20, 3)
    raise RuntimeError(f"this system does not report {key}")


STAGES = {"python": memory()}

import torch  # noqa: E402

STAGES["torch"] = memory()

from sstf.features import FeatureStore  # noqa: E402
from sstf.heap import trim  # noqa: E402
from sstf.methods import Eagle3Config, build_method  # noqa: E402
from sstf.train.config import TrainConfig  # noqa: E402
from sstf.train.trainer import Trainer  # noqa: E402

STAGES["imports"] = memory()


def train(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train one conversation a step; the figures of the steps after the warm-up."""
    after_import = memory("VmHWM")
    source = FeatureStore(args.store)
    method = Eagle3Config(ttt_steps=args.ttt_steps, draft_vocab_size=args.draft_vocab)
    config = TrainConfig(
        steps=args.warm_up + args.steps + 1,
        step_tokens=16,  # fewer than any conversation has: one a step
        batch_tokens=max(source.lengths),
        validation_conversations=0,
        validate_every=10**6,
        checkpoint_every=10**6,
    )
    trainer = Trainer(source, build_method(method), method, config, folder, 0)
    assert all(len(step) == 1 for step in trainer.plan)
    STAGES["trainer"] = memory()
    for _ in range(args.warm_up):
        figures = trainer.train_step()
    first_loss = figures["train/loss/0"]
    tokens, waited = trainer.progress.trained_tokens, trainer.feed.waited
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    started = [clock() for clock in clocks]
    for _ in range(args.steps):
        figures = trainer.train_step()
    seconds, cpu_seconds, of_first = (clock() - start for clock, start in zip(clocks, started, strict=True))
    tokens, waited, peak = trainer.progress.trained_tokens - tokens, trainer.feed.waited - waited, memory("VmHWM")
    assert tokens == args.steps * max(source.lengths)
    memory_of_a_step(trainer)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_a_step": round(seconds / args.steps, 4),
        "cpu_seconds_a_step": round(cpu_seconds / args.steps, 4),
        "first_thread_cpu_seconds_a_step": round(of_first / args.steps, 4),
        "waited_for_data": round(waited, 3),
        "loss_of_step_0": [round(first_loss, 3), round(figures["train/loss/0"], 3)],
        "threads": torch.get_num_threads(),
        "peak_rss_gib": peak,
        "rss_after_import_gib": after_import,
        "rss_gib": STAGES,
    }


def memory_of_a_step(trainer: Trainer) -> None:
    """One more step, whose stages go into `STAGES`."""

    def after_forward(*unused: object) -> None:
        STAGES["forward_peak"] = memory("VmHWM")
        trim()
        STAGES["forward_kept"] = memory()
        _reset_peak()

    trainer.module.register_forward_hook(after_forward)
    trim()
    STAGES["between_steps"] = memory()
    _reset_peak()
    trainer.train_step()
    STAGES["backward_peak"] = memory("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again from the present VmRSS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--ttt-steps", type=int, default=3)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=12, help="steps that are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(args, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
