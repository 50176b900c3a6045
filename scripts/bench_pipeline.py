"""Speed and memory of every stage on this machine, as JSON lines.

    python scripts/bench_pipeline.py [--quick]

Extraction is compared with a bare forward pass of the same target, batch and dtype, the two in turn, and the ratio is
the median of the pairs. Training runs in a process of its own, so that its peak resident memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sstf.data.chat_template import render, render_prompt
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.conversations import read_conversations
from sstf.data.progress import NoProgress
from sstf.evaluation import hardware
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.features.extract import batches_of
from sstf.methods import Eagle3Config, build_method
from sstf.targets import Target, load_target
from sstf.targets.sampling import BatchSampler
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.types import SamplingParams, TokenSample


def emit(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def peak_rss_gib() -> float:
    """Peak resident memory of this process; `ru_maxrss` would include what a child inherits from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 2**20, 3)
    raise RuntimeError("this system does not report VmHWM")


def samples_of(target: Target, count: int, max_length: int) -> list[TokenSample]:
    config = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=count)
    return [render(target.tokenizer, c, max_length) for c in read_conversations(config).conversations]


def bench_extraction(target: Target, samples: list[TokenSample], repeats: int) -> None:
    """Both process the same conversations in the same batches; extraction also writes its shards."""
    spec = build_method(Eagle3Config()).feature_spec(target.spec)
    config = ExtractConfig()
    tokens = sum(len(s.input_ids) for s in samples)
    batches = []
    for batch in batches_of([len(s.input_ids) for s in samples], config.batch_tokens):
        width = max(len(samples[i].input_ids) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(samples[i].input_ids)] = torch.tensor(samples[i].input_ids)
        batches.append(ids.to(target.device))

    def bare() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                target.model(ids, use_cache=False)
        return time.perf_counter() - started

    def full() -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            extract(target, samples, spec, config, Path(folder), NoProgress())
            return time.perf_counter() - started

    bare()
    pairs = [(bare(), full()) for _ in range(repeats)]
    emit(
        bench="extraction",
        tokens=tokens,
        bare_forward_tokens_per_second=round(tokens / statistics.median(b for b, _ in pairs), 1),
        extraction_tokens_per_second=round(tokens / statistics.median(f for _, f in pairs), 1),
        ratio=round(statistics.median(b / f for b, f in pairs), 3),
        ratios=[round(b / f, 3) for b, f in pairs],
        note="bare forward = the model's own forward with logits; extraction includes teacher figures and writing",
    )


def bench_regeneration(target: Target, prompts: int, new_tokens: int, slots: int) -> None:
    config = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=prompts)
    encoded = [render_prompt(target.tokenizer, c.messages[:1]) for c in read_conversations(config).conversations]
    params = [SamplingParams(0.8 if i % 2 else 0.0, 0.95, 256, new_tokens, seed=i) for i in range(len(encoded))]
    sampler = BatchSampler(target)
    sampler.sample(encoded[:2], params[:2], 2)
    started = time.perf_counter()
    written = sum(len(result.token_ids) for result in sampler.sample(encoded, params, slots))
    emit(
        bench="regeneration",
        tokens_per_second=round(written / (time.perf_counter() - started), 1),
        slots=slots,
        tokens=written,
    )


def _train_process(store: str, ttt_steps: int, steps: int, queue: multiprocessing.Queue) -> None:
    before = peak_rss_gib()
    method_config = Eagle3Config(ttt_steps=ttt_steps, draft_vocab_size=8192)
    config = TrainConfig(
        steps=steps, batch_tokens=1024, validation_conversations=0, validate_every=10**6, checkpoint_every=10**6
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            FeatureStore(Path(store)), build_method(method_config), method_config, config, Path(folder), 0
        )
        trainer.train_step()  # warm-up
        started, tokens = time.perf_counter(), trainer.progress.trained_tokens
        while trainer.progress.step < steps:
            trainer.train_step()
        seconds = time.perf_counter() - started
        tokens = trainer.progress.trained_tokens - tokens
    queue.put(
        {
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds_a_step": round(seconds / (steps - 1), 3),
            "peak_rss_gib": peak_rss_gib(),
            "rss_after_import_gib": before,
        }
    )


def bench_training(target: Target, samples: list[TokenSample], steps: int) -> None:
    """Rows of 1,024 tokens: sample conversations joined end to end, so that every step is a full one."""
    joined_ids = [token for s in samples for token in s.input_ids]
    joined_mask = [flag for s in samples for flag in s.loss_mask]
    rows = [
        TokenSample(str(i), joined_ids[i : i + 1024], joined_mask[i : i + 1024])
        for i in range(0, len(joined_ids) - 1023, 1024)
    ]
    with tempfile.TemporaryDirectory() as folder:
        spec = build_method(Eagle3Config()).feature_spec(target.spec)
        extract(target, rows[:24], spec, ExtractConfig(), Path(folder), NoProgress())
        context = multiprocessing.get_context("spawn")
        for ttt_steps in (3, 7):
            queue = context.Queue()
            process = context.Process(target=_train_process, args=(folder, ttt_steps, steps, queue))
            process.start()
            figures = queue.get()
            process.join()
            emit(bench="training", ttt_steps=ttt_steps, draft_vocab=8192, length=1024, optimizer="adamw", **figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work: figures are rougher")
    args = parser.parse_args()
    small = args.quick
    target = load_target(args.target)
    emit(bench="machine", target=target.spec.name, dtype=target.spec.dtype, **hardware())
    samples = samples_of(target, 100, 1024)
    bench_extraction(target, samples[: 20 if small else 60], 3 if small else 5)
    bench_training(target, samples, 4 if small else 12)
    bench_regeneration(target, 32 if small else 96, 32 if small else 128, 32)


if __name__ == "__main__":
    main()
