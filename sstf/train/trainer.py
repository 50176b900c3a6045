"""THE training loop: any trainable method, offline features, one or several processes through accelerate.

A global step is a list of micro-batches, dealt out to the processes in turn. Every process adds up the gradients of
SUMMED losses; before the optimiser moves they are divided by the number of valid tokens of the whole step over all
processes. So accumulation, batch sizes and processes change rounding only, never the objective.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sstf.data.progress import Progress as Bars
from sstf.errors import ConfigError, DamagedDataError, DataError
from sstf.features import FeatureStore, collate, epoch_batches, split, to_device
from sstf.losses import accepted_drafts
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import save_head
from sstf.targets import FrozenHead
from sstf.targets.draft_vocab import choose_draft_vocab, coverage
from sstf.tracking import Tracker, open_trackers
from sstf.train.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from sstf.train.config import TrainConfig
from sstf.types import FeatureBatch, StepOutput


class HeadWithLoss(nn.Module):
    """Head and objective as one module, so that DDP and its kin see a single forward whatever the head unrolls.

    Parameters stay float32; under `precision` bf16 the products run in bfloat16. This is not left to accelerate,
    which fixes the precision once per Python process.
    """

    def __init__(self, method: TrainableMethod, head: nn.Module, frozen: FrozenHead, precision: str) -> None:
        super().__init__()
        self.method, self.head, self.frozen = method, head, frozen
        self.bf16 = precision == "bf16"
        # Buffers are the same everywhere and never change; DDP would send the embeddings around in every forward.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, batch: FeatureBatch) -> StepOutput:
        """Summed loss and counts of one batch."""
        with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=self.bf16):
            return self.method.loss(self.head, batch, self.frozen)


@dataclass(frozen=True)
class Validation:
    """Held-out figures, one entry a test-time-training step.

    `simulated_accepted_length` = 1 + mean over anchors of the leading hits of a greedy chain of `ttt_steps`, where a
    hit is the draft's argmax being the target's argmax; it is what a chain of that depth would reach if every
    position were an anchor.
    """

    simulated_accepted_length: float
    accuracy: list[float]
    overlap: list[float]
    loss: list[float]

    def figures(self) -> dict[str, float]:
        """Under the names that trackers get."""
        out = {"val/simulated_accepted_length": self.simulated_accepted_length}
        for name in ("accuracy", "overlap", "loss"):
            out |= {f"val/{name}/{i}": value for i, value in enumerate(getattr(self, name))}
        return out


class Trainer:
    """Trains one head on one feature store, in `folder`; run again, it goes on from the latest checkpoint."""

    def __init__(
        self,
        store: FeatureStore,
        method: TrainableMethod,
        method_config: Any,
        config: TrainConfig,
        folder: Path,
        seed: int,
    ) -> None:
        self.store, self.method, self.method_config, self.config = store, method, method_config, config
        self.folder, self.seed = folder, seed
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self._check_launch()
        spec = method.feature_spec(store.target)
        if spec.layers != store.layers:
            raise DamagedDataError(
                f"{store.folder} holds layers {list(store.layers)}, the method reads {list(spec.layers)}; extract again"
            )
        self.training, self.held_out = split(store, config.validation_conversations, seed)
        if not self.training:
            raise DataError("no conversation to train on: none has three tokens of which one is trained")
        frequencies = _supervised_frequencies(store, self.training)
        size = min(method.draft_vocab_size, store.target.vocab_size)
        draft_tokens = choose_draft_vocab(frequencies, size)
        self.coverage = coverage(_supervised_frequencies(store, self.held_out or self.training), draft_tokens)
        torch.manual_seed(seed)
        frozen = store.frozen_head().to(self.accelerator.device)
        head = method.build_head(store.target, frozen, draft_tokens.to(self.accelerator.device))
        self.module = HeadWithLoss(method, head.to(self.accelerator.device), frozen, config.precision)
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.progress = self._resume(head, optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.plan = self._plan()

    def _check_launch(self) -> None:
        """Launchers fall back to one process in silence; a micro-batch that no process gets would be lost."""
        world = self.accelerator.num_processes
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != world:
            raise ConfigError(
                f"the launcher started {asked} processes but accelerate joined {world} "
                f"({self.accelerator.distributed_type}); on CPUs use an accelerate config with distributed_type "
                "MULTI_GPU and use_cpu true"
            )
        if self.config.batches_per_step % world:
            raise ConfigError(
                f"train.batches_per_step is {self.config.batches_per_step}, which {world} processes cannot share "
                f"evenly; use a multiple of {world}"
            )

    def _resume(self, head: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        found = list_checkpoints(self.folder / "checkpoints")
        return load_checkpoint(found[-1], head, optimizer) if found else Progress()

    def _plan(self) -> list[list[list[int]]]:
        """Micro-batches of every step of the run: plan[step][i] are indices into the store."""
        config = self.config
        lengths = [self.store.lengths[i] - 2 for i in self.training]
        steps: list[list[list[int]]] = []
        loose: list[list[int]] = []
        epoch = 0
        while len(steps) < (config.steps or math.inf) and epoch < (config.epochs or math.inf):
            batches = epoch_batches(lengths, config.batch_tokens, self.seed, epoch)
            loose += [[self.training[i] for i in batch] for batch in batches]
            cut = len(loose) - len(loose) % config.batches_per_step
            steps += [loose[i : i + config.batches_per_step] for i in range(0, cut, config.batches_per_step)]
            loose = loose[cut:]
            epoch += 1
        steps = steps[: config.steps] if config.steps else steps
        if not steps:
            raise ConfigError(
                f"train.batches_per_step is {config.batches_per_step} but the data gives {len(loose)} batches in all; "
                "lower it, or train for more epochs"
            )
        return steps

    def run(self, bars: Bars, run_name: str, effective_config: dict[str, Any]) -> dict[str, Any]:
        """Train to the end of the plan.

        Returns:
            A summary: steps, tokens/s, draft-vocabulary coverage, and the validation of the chosen head, which is in
            `folder/head`.
        """
        main = self.accelerator.is_main_process
        trackers = (
            open_trackers(self.config.trackers, run_name, self.folder, effective_config, self.progress.step)
            if main
            else []
        )
        started, start_tokens = time.perf_counter(), self.progress.trained_tokens
        with ExitStack() as closing, bars.start("training", len(self.plan), "steps") as bar:
            for tracker in trackers:
                closing.callback(tracker.close)
            bar.advance(self.progress.step)
            while self.progress.step < len(self.plan):
                figures = self.train_step()
                bar.advance(1)
                done = self.progress.step == len(self.plan)
                if trackers and (done or self.progress.step % self.config.log_every == 0):
                    seconds = time.perf_counter() - started
                    figures["tokens_per_second"] = (self.progress.trained_tokens - start_tokens) / seconds
                    _log(trackers, self.progress.step, figures)
                if done or self.progress.step % self.config.validate_every == 0:
                    self._validate_and_choose(trackers)
                if done or self.progress.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
            seconds = time.perf_counter() - started
        return {
            "steps": len(self.plan),
            "trained_tokens": self.progress.trained_tokens,
            "tokens_per_second": round((self.progress.trained_tokens - start_tokens) / seconds, 1)
            if seconds > 0
            else 0.0,
            "simulated_accepted_length": self.progress.best if self.held_out else None,
            "best_step": self.progress.best_step,
            "draft_vocab_coverage": self.coverage,
            "processes": self.accelerator.num_processes,
        }

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its figures under the names that trackers get."""
        config, accelerator = self.config, self.accelerator
        step = self.progress.step
        lr = learning_rate(step, len(self.plan), config.learning_rate, config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mine = self.plan[step][accelerator.process_index :: accelerator.num_processes]
        self.module.train()
        sums: Tensor | None = None
        for i, indices in enumerate(mine):
            # Gradients cross processes once a step, with the last micro-batch.
            with accelerator.no_sync(self.wrapped) if i + 1 < len(mine) else nullcontext():
                output: StepOutput = self.wrapped(self._load(indices))
                accelerator.backward(output.loss)
            part = torch.stack([output.valid, output.losses, output.hits, output.overlap])
            sums = part if sums is None else sums + part
        assert sums is not None
        sums = accelerator.reduce(sums, "sum")
        valid = sums[0, 0].clamp_min(1.0)
        for parameter in self.module.head.parameters():
            if parameter.grad is not None:
                # DDP averaged over the processes; the objective is a sum over them, divided by the global count.
                parameter.grad.mul_(accelerator.num_processes / valid)
        norm = torch.nn.utils.clip_grad_norm_(self.module.head.parameters(), config.clip)
        if not bool(torch.isfinite(norm)):
            names = [self.store.ids[i] for batch in self.plan[step] for i in batch]
            raise DataError(
                f"step {step}: the gradient is not finite; the step's conversations are {', '.join(names[:8])}"
                f"{f' and {len(names) - 8} more' if len(names) > 8 else ''}; look at their features, or lower "
                "train.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.trained_tokens += sum(self.store.lengths[i] for batch in self.plan[step] for i in batch)
        count = sums[0].clamp_min(1.0)
        figures = {"lr": lr, "grad_norm": float(norm)}
        for row, name in enumerate(("loss", "accuracy", "overlap"), start=1):
            figures |= {f"train/{name}/{i}": v for i, v in enumerate((sums[row] / count).tolist())}
        return figures

    def _load(self, indices: list[int]) -> FeatureBatch:
        return to_device(collate([self.store[i] for i in indices]), self.accelerator.device)

    def _validate_and_choose(self, trackers: list[Tracker]) -> None:
        """Keep the head with the highest simulated accepted length; loss may fall while acceptance falls too."""
        if not self.held_out:
            self.progress.best_step = self.progress.step
            self._save_head({})
            return
        result = self.validate()
        if trackers:
            _log(trackers, self.progress.step, result.figures())
        if result.simulated_accepted_length > self.progress.best:
            self.progress.best, self.progress.best_step = result.simulated_accepted_length, self.progress.step
            self._save_head(result.figures())

    def _save_head(self, figures: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            run = {"step": self.progress.step, "draft_vocab_coverage": self.coverage, **figures}
            save_head(self.folder / "head", self.method_config, self.module.head, self.store.target, run)

    @torch.no_grad()
    def validate(self) -> Validation:
        """Figures on the held-out conversations, each process taking its share of them."""
        accelerator = self.accelerator
        self.module.eval()
        lengths = [self.store.lengths[i] - 2 for i in self.held_out]
        batches = epoch_batches(lengths, self.config.batch_tokens, self.seed, 0)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        sums: Tensor | None = None
        accepted = torch.zeros(2, device=accelerator.device)
        for batch in mine or batches[:1]:
            output = self.module(self._load([self.held_out[i] for i in batch]))
            part = torch.stack([output.valid, output.losses, output.hits, output.overlap])
            sums = part if sums is None else sums + part
            chains = accepted_drafts(output.chain_hits)
            accepted += torch.tensor([chains.sum(), len(chains)], device=accelerator.device)
        assert sums is not None
        if not mine:  # more processes than batches: only the shape was needed
            sums, accepted = torch.zeros_like(sums), torch.zeros_like(accepted)
        sums, accepted = accelerator.reduce(sums, "sum"), accelerator.reduce(accepted, "sum")
        means = (sums[1:] / sums[0].clamp_min(1.0)).tolist()
        return Validation(1 + float(accepted[0] / accepted[1].clamp_min(1.0)), means[1], means[2], means[0])

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints"
            optimizer = self.optimizer.optimizer  # accelerate's wrapper holds the real one
            save_checkpoint(folder, self.module.head, optimizer, self.progress, self.config.keep_last)
        self.accelerator.wait_for_everyone()


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine to 0. `step` is 0-based.

    >>> [round(learning_rate(i, 4, 1.0, 0.25), 3) for i in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _supervised_frequencies(store: FeatureStore, indices: list[int]) -> Tensor:
    """How often each target id is a trained token."""
    counts = torch.zeros(store.target.vocab_size, dtype=torch.int64)
    for i in indices:
        ids, mask = store.tokens_of(i)
        counts.index_add_(0, ids[mask], torch.ones(int(mask.sum()), dtype=torch.int64))
    return counts


def _log(trackers: list[Tracker], step: int, figures: dict[str, float]) -> None:
    for tracker in trackers:
        tracker.log(step, figures)
