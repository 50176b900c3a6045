"""Speed of the data side on this machine, as JSON lines.

    python scripts/bench_data.py [--quick] [--only regeneration extraction loader]

Regeneration is compared with transformers' own `generate`, one conversation at a time, and extraction with a bare
forward pass, each in turn with its rival; a ratio is the median of the pairs. The loader's figure is the share of a
training's time in which the trainer waited for its next batch. What a codec costs in bytes and in accepted length is
measured by `scripts/bench_codecs.py`, and vLLM beside our regeneration by `scripts/verify_server_regeneration.sh`.
"""

from __future__ import annotations

import argparse
import json
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
from sstf.features import ExtractConfig, FeatureSource, FeatureStore, OnlineFeatures, extract
from sstf.features.shards import batches_of
from sstf.methods import Eagle3Config, build_method
from sstf.targets import Target, load_target
from sstf.targets.sampling import BatchSampler
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.types import Conversation, SamplingParams, TokenSample

PARTS = ("regeneration", "extraction", "loader")
METHOD = Eagle3Config(ttt_steps=3, draft_vocab_size=8192)


def emit(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def sample_conversations(count: int) -> list[Conversation]:
    config = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=count)
    return [c for c in read_conversations(config).conversations if isinstance(c, Conversation)]


def bench_regeneration(target: Target, prompts: int, alone: int, new_tokens: int, slots: int, repeats: int) -> None:
    """Tokens written a second: many at once by `BatchSampler`, and one by one by `generate` (greedy, the cheaper)."""
    encoded = [render_prompt(target.tokenizer, c.messages[:1]) for c in sample_conversations(prompts)]
    params = [SamplingParams(0.8 if i % 2 else 0.0, 0.95, 256, new_tokens, seed=i) for i in range(len(encoded))]
    sampler = BatchSampler(target)

    def together() -> float:
        started = time.perf_counter()
        written = sum(len(result.token_ids) for result in sampler.sample(encoded, params, slots))
        return written / (time.perf_counter() - started)

    def one_by_one() -> float:
        written, started = 0, time.perf_counter()
        for ids in encoded[:alone]:
            prompt = torch.tensor([ids], device=target.device)
            with torch.inference_mode():
                out = target.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens
                )
            written += out.shape[1] - prompt.shape[1]
        return written / (time.perf_counter() - started)

    sampler.sample(encoded[:2], params[:2], 2)
    pairs = [(one_by_one(), together()) for _ in range(repeats)]
    emit(
        bench="regeneration",
        slots=slots,
        prompts=len(encoded),
        max_new_tokens=new_tokens,
        tokens_per_second=round(statistics.median(t for _, t in pairs), 1),
        generate_tokens_per_second=round(statistics.median(o for o, _ in pairs), 1),
        ratio=round(statistics.median(t / o for o, t in pairs), 2),
        ratios=[round(t / o, 2) for o, t in pairs],
    )


def bench_extraction(target: Target, samples: list[TokenSample], config: ExtractConfig, repeats: int) -> None:
    """Both process the same conversations in the same batches; extraction also encodes and writes its shards."""
    spec = build_method(METHOD).feature_spec(target.spec)
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
        **config.model_dump(mode="json"),
        tokens=tokens,
        bare_forward_tokens_per_second=round(tokens / statistics.median(b for b, _ in pairs), 1),
        extraction_tokens_per_second=round(tokens / statistics.median(f for _, f in pairs), 1),
        ratio=round(statistics.median(b / f for b, f in pairs), 3),
        ratios=[round(b / f, 3) for b, f in pairs],
        note="bare forward = the model's own forward with logits; extraction includes teacher figures and writing",
    )


def bench_loader(target: Target, samples: list[TokenSample], config: ExtractConfig, steps: int) -> None:
    """A training from stored features, and the same one online."""
    spec = build_method(METHOD).feature_spec(target.spec)
    with tempfile.TemporaryDirectory() as folder:
        extract(target, samples, spec, config, Path(folder) / "store", NoProgress())
        stored, online = FeatureStore(Path(folder) / "store"), OnlineFeatures(target, samples, spec, config)
        sources: dict[str, FeatureSource] = {"stored": stored, "online": online}
        for name, source in sources.items():
            plan = TrainConfig(steps=steps, batch_tokens=1024, validation_conversations=0, checkpoint_every=10**6)
            trainer = Trainer(source, build_method(METHOD), METHOD, plan, Path(folder) / name, 0)
            trainer.train_step()  # the first one waits for the first batch, whatever the loader
            trainer.waited, started = 0.0, time.perf_counter()
            while trainer.progress.step < steps:
                trainer.train_step()
            seconds = time.perf_counter() - started
            emit(
                bench="loader",
                source=name,
                **config.model_dump(mode="json"),
                seconds_a_step=round(seconds / (steps - 1), 3),
                waited_share=round(trainer.waited / seconds, 4),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work: figures are rougher")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    small, parts = args.quick, args.only
    target = load_target(args.target)
    emit(bench="machine", target=target.spec.name, dtype=target.spec.dtype, **hardware())
    samples = [render(target.tokenizer, c, 1024) for c in sample_conversations(60 if small else 160)]
    if "regeneration" in parts:
        bench_regeneration(target, 64 if small else 192, 2 if small else 6, 128, 64, 1 if small else 3)
    # Small shards, so that all cores have work on so little data.
    configs = [ExtractConfig(shard_tokens=4096), ExtractConfig(codec="int8", compression="zstd", shard_tokens=4096)]
    if "extraction" in parts:
        for config in configs:
            bench_extraction(target, samples, config, 1 if small else 3)
    if "loader" in parts:
        for config in configs:
            bench_loader(target, samples, config, 4 if small else 10)


if __name__ == "__main__":
    main()
