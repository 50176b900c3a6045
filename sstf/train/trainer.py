"""THE training loop: any trainable method, stored or online features, one or several processes.

A step is a list of conversations, dealt out to the processes, each of which cuts its share into micro-batches. Every
process adds up the gradients of SUMMED losses; before the optimiser moves they are divided by the number of valid
tokens of the whole step over all processes. So accumulation, batch sizes and processes change rounding only, never the
objective.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sstf.data.progress import Progress as Bars
from sstf.errors import ConfigError, DamagedDataError, DataError, Stopped
from sstf.features import FeatureSource, split, to_device
from sstf.features.vocabulary import teacher_mass, token_counts
from sstf.heap import trim
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import save_head
from sstf.targets import FrozenHead
from sstf.targets.draft_vocab import coverage
from sstf.tracking import open_trackers
from sstf.train.budget import GIB, LEAST_LOSS_ROWS, choose, free_memory
from sstf.train.checkpoint import Checkpoint, Progress, save_checkpoint
from sstf.train.config import TrainConfig
from sstf.train.ema import Ema
from sstf.train.faults import not_finite
from sstf.train.feed import Feed
from sstf.train.memory import is_out_of_memory, trained
from sstf.train.module import HeadWithLoss
from sstf.train.optim import build_optimizers, check_optimizer_fits
from sstf.train.parallel import Launch, open_launch, open_parallel
from sstf.train.plan import check_processes, plan_steps
from sstf.train.provenance import provenance, record_start, scrubbed
from sstf.train.real_decode import RealDecode
from sstf.train.report import Report
from sstf.train.schedule import factor
from sstf.train.start import choose_draft_tokens, draft_tokens_of, find_start, origin_of
from sstf.train.termination import Termination
from sstf.train.validation import Validation, validated
from sstf.types import FeatureBatch

TRIM_EVERY = 4  # steps
JUDGED_ROWS = 2048  # held-out positions by which a draft vocabulary is judged


class Trainer:
    """Trains one head on one source of features, in `folder`; run again, it goes on from the latest checkpoint.

    Args:
        source: the features.
        method: what is trained.
        method_config: its settings, which go along with the head.
        config: how.
        folder: for checkpoints, log and head.
        seed: of everything that is drawn.
        real_decode: needed, in the main process, where `config.real_decode` is given.
        launch: this process among those that train together; found out from the launcher if not given.
        held_out: the conversations by which the head is chosen; drawn from the source if not given.
    """

    def __init__(
        self,
        source: FeatureSource,
        method: TrainableMethod,
        method_config: Any,
        config: TrainConfig,
        folder: Path,
        seed: int,
        real_decode: RealDecode | None = None,
        launch: Launch | None = None,
        held_out: Sequence[int] | None = None,
    ) -> None:
        self.source, self.method, self.method_config, self.config = source, method, method_config, config
        self.folder, self.seed, self.real_decode = folder, seed, real_decode
        self.launch = launch or open_launch()
        free = free_memory(self.launch)
        check_optimizer_fits(config.optimizer, self.launch.kind)
        if config.ema and self.launch.kind not in ("single", "ddp"):
            raise ConfigError(
                f"train.ema={config.ema} needs whole weights in every process, {self.launch.kind} splits them; use DDP "
                "or leave train.ema out"
            )
        spec = method.feature_spec(source.target)
        if spec.layers != source.layers:
            raise DamagedDataError(
                f"{source.name} holds layers {list(source.layers)}, the method reads {list(spec.layers)}; extract again"
            )
        self.training, self.held_out = split(source, config.validation_conversations, seed, held_out)
        if not self.training:
            raise DataError("no conversation to train on: none has three tokens of which one is trained")
        self._build()
        self.plan = self._plan()
        longest = max(source.lengths[i] for i in (*self.training, *self.held_out)) - 2
        loss_rows = self.progress.loss_rows or method.loss_rows
        self.budget = choose(self.trained, longest, config, loss_rows, free, self.progress.batch_tokens)
        method.loss_rows = self.budget.sizes.loss_rows
        self.note: Callable[[str], None] = warnings.warn  # until `run` knows who watches
        self.feed = Feed(source, self.launch, self.plan, self.budget.sizes.rows, config.feature_noise, seed)

    def _build(self) -> None:
        """The head, from where it is to start, and what moves it."""
        source, config, device = self.source, self.config, self.launch.device
        frozen = source.frozen_head().to(device)
        self.origin = origin_of(source, self.method_config, config, self.seed)
        start = find_start(self.folder, config, self.origin, source)
        if start:
            draft_tokens = draft_tokens_of(start.head)
        else:
            draft_tokens = choose_draft_tokens(
                source, self.training, self.method, config, frozen, self.seed, self.launch
            )
        self.vocabulary = self._judge_vocabulary(frozen, draft_tokens)
        torch.manual_seed(self.seed)
        head = self.method.build_head(source.target, frozen, draft_tokens.to(device)).to(device)
        if start:
            head.load_state_dict(start.head)
        supervised = sum(source.trained[i] for i in self.training) / sum(source.lengths[i] for i in self.training)
        taps = source.target.hidden_size * len(source.layers)
        sizes = trained(head, frozen, taps, self.method.unrolls, supervised, config, device)
        self.trained = replace(sizes, kind=self.launch.kind, processes=self.launch.processes)
        self.module = HeadWithLoss(self.method, head, frozen, config.precision)
        self.parallel = open_parallel(self.launch, self.module, lambda named: build_optimizers(config.optimizer, named))
        self.ema = Ema(config.ema, head.named_parameters()) if config.ema else None
        self.progress = replace(start.progress) if start else Progress()
        if start and start.optimizer:
            self.parallel.load(start.head, start.optimizer)
            if self.ema and start.average:
                self.ema.load(start.average)

    def _judge_vocabulary(self, frozen: FrozenHead, draft_tokens: Tensor) -> dict[str, float]:
        judged = self.held_out or self.training
        mass = teacher_mass(self.source, frozen, judged, JUDGED_ROWS)[0]
        return {
            "draft_vocab_coverage": coverage(token_counts(self.source, judged), draft_tokens),
            "draft_vocab_lost_mass": 1 - coverage(mass, draft_tokens),
        }

    def _plan(self) -> list[list[int]]:
        """Conversations of every step, as indices into the source."""
        rows = [self.source.lengths[i] - 2 for i in self.training]
        steps = plan_steps(rows, self.config, self.seed)
        check_processes(steps, self.launch.processes, self.config.step_tokens)
        return [[self.training[i] for i in step] for step in steps]

    def run(self, bars: Bars, run_name: str, effective_config: dict[str, Any]) -> dict[str, Any]:
        """Train to the end of the plan, or until acceptance has fallen for long enough.

        Returns:
            A summary: steps, tokens/s, draft-vocabulary coverage, and the accepted length of the chosen head, which is
            in `folder/head`.

        Raises:
            Stopped: the process was asked to end; a checkpoint was written.
            DataError: features or loss are not finite; the last checkpoint is kept.
        """
        self.note = bars.note
        if self.launch.is_main:
            self.note(str(self.budget))
        with ExitStack() as closing:
            termination = closing.enter_context(Termination())
            self.report = closing.enter_context(self._open_report(bars, run_name, effective_config))
            tokens_before = self.progress.trained_tokens
            if self.config.warm_start and self.progress.step == 0:
                self._validate_and_choose()
            while not self._finished():
                figures = self.train_step(termination.asked)
                step, last = self.progress.step, self.progress.step == len(self.plan)
                self.report.step(step, figures, self.progress.trained_tokens - tokens_before, self.feed.waited)
                if last or step % self.config.validate_every == 0:
                    self._validate_and_choose()
                if self._finished() or self._asked_to_stop or step % self.config.checkpoint_every == 0:
                    self._checkpoint()
                if self._asked_to_stop and not self._finished():
                    raise Stopped(
                        f"asked to stop: the training is saved after step {step} of {len(self.plan)}; the same "
                        "command goes on from there"
                    )
        return self._summary()

    def _open_report(self, bars: Bars, run_name: str, effective_config: dict[str, Any]) -> Report:
        config, done = self.config, self.progress.step
        if self.launch.is_main:
            record_start(self.folder, provenance(effective_config, self.source, self.launch.facts(), done))
        trackers = (
            open_trackers(config.trackers, run_name, self.folder, scrubbed(effective_config), done, bars.note)
            if self.launch.is_main
            else []
        )
        # The view's best is a simulated one.
        simulated = 0 if config.real_decode else max(0, self.progress.best_step)
        view = bars.training(len(self.plan), done, self.progress.best if simulated else 0.0, simulated)
        return Report(view, trackers, len(self.plan), done, config.log_every)

    def _summary(self) -> dict[str, Any]:
        progress, pace = self.progress, self.report.pace()
        return {
            "steps": progress.step,
            "planned_steps": len(self.plan),
            "skipped_steps": progress.skipped,
            "trained_tokens": progress.trained_tokens,
            "tokens_per_second": round(pace["tokens_per_second"], 1),
            "waited_for_data": round(pace["waiting_share"], 4),
            "accepted_length": progress.best if self.held_out else None,
            "chosen_by": "tau_real" if self.config.real_decode else "simulated_accepted_length",
            "best_step": progress.best_step,
            "planned_memory_gib": round(self.budget.need / GIB, 3),
            "micro_batch_tokens": self.feed.batch_tokens,
            "loss_rows": self.method.loss_rows,
            **self.vocabulary,
            **self.launch.facts(),
        }

    def _finished(self) -> bool:
        patience = self.config.patience
        return self.progress.step == len(self.plan) or (patience is not None and self.progress.declining >= patience)

    def train_step(self, asked_to_stop: bool = False) -> dict[str, float]:
        """One optimiser step; returns its figures under the names that trackers get.

        Raises:
            DataError: the gradient is not finite; the weights are those of before the step.
        """
        step = self.progress.step
        share = factor(self.config.schedule, step, len(self.plan))
        self.parallel.set_lr(share)
        sums = self._accumulate(step, asked_to_stop)
        self._asked_to_stop = bool(sums[-1] > 0)
        steps = sums[:-1].reshape(4, -1)
        valid = float(steps[0, 0])
        figures = {"lr": share * self.config.optimizer.learning_rate}
        if not torch.isfinite(steps).all():
            self.parallel.forget()
            raise self._not_finite(step)
        if valid > 0:
            norm = float(self.parallel.step(1 / valid, self.config.clip))
            if not math.isfinite(norm):
                raise self._not_finite(step)
            figures["grad_norm"] = norm
            if self.ema:
                self.ema.update(step)
        else:
            self.parallel.forget()
            self.progress.skipped += 1
        self.progress.step += 1
        if self.progress.step % TRIM_EVERY == 0:
            trim()
        self.progress.trained_tokens += sum(self.source.lengths[i] for i in self.plan[step])
        count = steps[0].clamp_min(1.0)
        for row, name in enumerate(("loss", "accuracy", "overlap"), start=1):
            figures |= {f"train/{name}/{i}": v for i, v in enumerate((steps[row] / count).tolist())}
        return figures

    def _accumulate(self, step: int, asked_to_stop: bool) -> Tensor:
        """Gradients of a step, in the parameters; and over all processes its sums [4 * positions], with how many
        processes were asked to stop behind them. Where memory is short, micro-batches are halved."""
        while True:
            try:
                self.module.train()
                sums = torch.zeros(4, self.method.positions, device=self.launch.device)
                for batch, last in self.feed.step(step):
                    output = self.parallel.backward(batch, last)
                    sums += torch.stack([output.valid, output.losses, output.hits, output.overlap])
                return self.launch.reduce(torch.cat([sums.flatten(), sums.new_tensor([float(asked_to_stop)])]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # Without its frames, which hold what the step had computed.
                self._halve(step, error.with_traceback(None))

    def _halve(self, step: int, error: Exception) -> None:
        """Half as many tokens at once from here on, or half the chunk of the loss; the step is computed anew."""
        longest = max(self.feed.rows[i] for i in self.plan[step])
        now = min(self.feed.batch_tokens, sum(self.feed.rows[i] for i in self.plan[step]))
        # Other processes wait for this one within the step: there is no going back together.
        if self.launch.processes > 1 or (now <= longest and self.method.loss_rows <= LEAST_LOSS_ROWS):
            less = f"set train.batch_tokens to {now // 2}" if now > longest else f"set data.max_length below {longest}"
            raise ConfigError(
                f"step {step}: memory is too short for {now} tokens at once; {less}, or lower method.ttt_steps or "
                "method.draft_vocab_size, and run the same command again: checkpoints are kept"
            ) from error
        self.parallel.forget()
        if now > longest:
            self.feed.batch_tokens = now // 2
            self.note(f"step {step}: out of memory with {now} tokens at once; from here on {now // 2}")
        else:
            self.method.loss_rows //= 2
            self.feed.batch_tokens = now  # drops batches that were loaded ahead
            self.note(
                f"step {step}: out of memory with a conversation of {longest} tokens alone; from here on loss chunks "
                f"of {self.method.loss_rows} rows"
            )
        trim()

    def _validate_and_choose(self) -> None:
        """Keep the head with the highest accepted length; loss may fall while acceptance falls too."""
        step = self.progress.step
        if not self.held_out:
            self.progress.best_step = step
            self._save_head(self.folder / "head", {})
            return
        with self.ema.swapped() if self.ema else nullcontext():
            figures = self.validate().figures()
            score = figures["val/simulated_accepted_length"]
            if self.config.real_decode:
                if step % self.config.real_decode.every and step != len(self.plan):
                    self.report.log(self.progress.step, figures)
                    return
                score = figures["val/tau_real"] = self._decode_for_real(figures)
            self.report.log(self.progress.step, figures)
            if score > self.progress.best:
                self.progress.best, self.progress.best_step, self.progress.declining = score, step, 0
                self._save_head(self.folder / "head", figures)
            else:
                self.progress.declining += 1

    def _decode_for_real(self, figures: dict[str, float]) -> float:
        """By the main process; the others wait."""
        candidate = self.folder / "candidate"
        self._save_head(candidate, figures)
        found = torch.zeros((), device=self.launch.device)
        if self.launch.is_main:
            assert self.real_decode is not None
            found += self.real_decode(candidate, self.source, self.held_out)
            shutil.rmtree(candidate)
        return float(self.launch.reduce(found))

    def _save_head(self, folder: Path, figures: dict[str, float]) -> None:
        trim()
        with self.parallel.whole_head() as head:
            if head is not None:
                run = {"step": self.progress.step, **self.vocabulary, **figures}
                save_head(folder, self.method_config, head, self.source.target, run)

    def validate(self) -> Validation:
        """Figures on the held-out conversations, each process taking its share of them."""
        self.module.eval()
        return validated(self.parallel, self.feed.once(self.held_out))

    def _checkpoint(self) -> None:
        trim()  # it makes copies, in other places than a step
        head, optimizer = self.parallel.state()
        if self.launch.is_main:
            average = self.ema.state() if self.ema else {}
            sizes = {"batch_tokens": self.feed.batch_tokens, "loss_rows": self.method.loss_rows}
            checkpoint = Checkpoint(replace(self.progress, **sizes), self.origin, head, optimizer, average)
            save_checkpoint(self.folder / "checkpoints", checkpoint, self.config.keep_last)
        self.launch.wait()

    def _not_finite(self, step: int) -> DataError:
        def loss(batch: FeatureBatch) -> float:
            output = self.parallel.evaluate(to_device(batch, self.launch.device))
            return float(output.loss)

        return not_finite(step, self.source, self.plan[step], loss)
