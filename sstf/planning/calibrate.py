"""How fast this machine is: the real functions of each stage, on a few conversations, for some seconds each.

Each measurement first runs something small, which pays for what first calls cost and tells how much work fits its
share of the time. A piece of work is never cut short, so a slow machine takes longer than was asked for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sstf.config import RunConfig
from sstf.data.chat_template import render_prompt
from sstf.data.config import DataConfig, RegenerateAnswers, SelfWrittenSource
from sstf.data.progress import NoProgress
from sstf.data.regenerate import answer_text
from sstf.data.sampler import derive_seed
from sstf.errors import DataError
from sstf.evaluation import evaluate
from sstf.evaluation.run import ALL
from sstf.features import FeatureSource, FeatureStore, OnlineFeatures, extract
from sstf.features.codecs import CODECS, compress
from sstf.features.engines import TransformersEngine
from sstf.features.record import Record
from sstf.features.shards import threads_for
from sstf.methods import DraftMethod, TrainableMethod
from sstf.methods.checkpoint import DraftHead
from sstf.planning.interval import Interval, mean_length
from sstf.planning.volume import Look, sketch_of, volume
from sstf.targets import Target
from sstf.targets.sampling import BatchSampler
from sstf.train.on_policy import roll_out
from sstf.train.trainer import Trainer
from sstf.types import Message, Sampled, SamplingParams, TokenSample

SECONDS = 20.0
# How the time is divided between the stages that are measured.
SHARES = {"regeneration": 8.0, "extraction": 4.0, "training": 5.0, "rollouts": 3.0, "evaluation": 3.0}
WARM_UP_TOKENS = 256
PACKED_TOKENS = 1024
EVALUATED_TOKENS = 8
ROLLED_OUT_TOKENS = 4


@dataclass(frozen=True)
class Rate:
    """`units` took `seconds`."""

    units: float
    seconds: float

    @property
    def per_second(self) -> float:
        """Units a second."""
        return self.units / self.seconds


@dataclass(frozen=True)
class Writing:
    """How the target writes with all slots busy. `samples` are what it wrote, each as far as it came."""

    reading: Rate  # prompt tokens
    writing: Rate  # answer tokens
    answer: Interval  # mean tokens of one answer
    request: Interval | None  # mean tokens of one self-written request
    samples: list[TokenSample] = field(repr=False)


@dataclass(frozen=True)
class Calibration:
    """What was measured; None where a stage was not."""

    writing: Writing | None = None
    extraction: Rate | None = None  # tokens
    packed: dict[str, float] = field(default_factory=dict)  # share that zstd leaves, by codec
    training: Rate | None = None  # tokens
    validation: Rate | None = None  # tokens
    rollouts: Rate | None = None  # tokens, with all slots and hardly a draft accepted
    passes: dict[str, float] = field(default_factory=dict)  # seconds a verify pass with its drafting, by arm
    seconds: float = 0.0


def calibrate(
    config: RunConfig,
    target: Target,
    method: DraftMethod,
    seen: Look,
    needed: Sequence[str],
    seconds: float = SECONDS,
) -> Calibration:
    """Measure the stages `needed`, keys of `SHARES`, in about `seconds` altogether.

    Args:
        config: The run's.
        target: Loaded.
        method: The configured one.
        seen: The look at the data, which gives conversations to work on.
        needed: What to measure.
        seconds: To spend.
    """
    started = time.perf_counter()
    whole = sum(SHARES[stage] for stage in needed)
    share = {stage: seconds * SHARES[stage] / whole for stage in needed}
    found, rows = Calibration(), seen.samples
    head = DraftHead(config.method.kind, method)
    with tempfile.TemporaryDirectory(prefix="sstf-plan-") as scratch:
        if "regeneration" in needed:
            writing = measure_writing(config.data, target, seen, share["regeneration"])
            found = replace(found, writing=writing)
            # Answers that were cut make short rows; training and extraction will see long ones.
            length = volume(seen, config.data, writing.answer, writing.request).tokens_each.middle
            rows = joined(writing.samples, round(length))
        features: FeatureSource | None = None
        if "extraction" in needed:
            store, rate = measure_extraction(config, target, method, rows, Path(scratch), share["extraction"])
            found = replace(found, extraction=rate, packed=packed_shares(store))
            features = store
        if "training" in needed:
            assert isinstance(method, TrainableMethod)
            if features is None:
                spec = method.feature_spec(target.spec)
                features = OnlineFeatures(target, rows, spec, config.extract)
            trainer = _trainer(config, method, features, Path(scratch))
            found = replace(found, training=measure_training(trainer, share["training"]))
            found = replace(found, validation=measure_validation(trainer))
            head = DraftHead("calibration", method, trainer.module.head.to(target.device, target.dtype).eval())
        if "rollouts" in needed:
            found = replace(found, rollouts=measure_rollouts(config, target, head, rows, share["rollouts"]))
        if "evaluation" in needed:
            found = replace(found, passes=measure_passes(config, target, head))
    return replace(found, seconds=time.perf_counter() - started)


def measure_writing(config: DataConfig, target: Target, seen: Look, seconds: float) -> Writing:
    """Requests, if the target writes them, and answers, with all slots busy, as far as the time reaches."""
    answers, source = config.answers, config.source
    assert isinstance(answers, RegenerateAnswers)
    prompts, request = seen.prompts, None
    if isinstance(source, SelfWrittenSource):
        seconds /= 2
        one = SamplingParams(source.temperature, source.top_p, source.top_k, source.max_prompt_tokens, source.seed)
        drawn = _write(target, [seen.prompts[0]] * source.slots, [one], seconds)
        request = mean_length(drawn.lengths, source.max_prompt_tokens)
        system = [Message("system", config.system_prompt)] if config.system_prompt else []
        texts = [answer_text(target.tokenizer, sampled).strip() for sampled in drawn.sampled]
        prompts = [render_prompt(target.tokenizer, [*system, Message("user", text)]) for text in texts]
    longest = config.max_length - 1
    usable = [prompt for prompt in prompts if len(prompt) <= longest]
    if not usable:
        raise DataError(
            f"no first request of the sample leaves room for an answer within data.max_length {config.max_length}; "
            "raise it"
        )
    prompts = [usable[i % len(usable)] for i in range(answers.slots)]
    limit = min(answers.max_new_tokens, config.max_length - max(len(prompt) for prompt in prompts))
    kinds = [SamplingParams(t, answers.top_p, answers.top_k, limit, answers.seed) for t in answers.temperatures]
    made = _write(target, prompts, kinds, seconds)
    samples = [
        TokenSample(str(i), [*prompt, *s.token_ids], [False] * len(prompt) + [True] * len(s.token_ids))
        for i, (prompt, s) in enumerate(zip(prompts, made.sampled, strict=True))
    ]
    return Writing(made.reading, made.writing, mean_length(made.lengths, answers.max_new_tokens), request, samples)


@dataclass(frozen=True)
class _Written:
    sampled: list[Sampled]
    reading: Rate
    writing: Rate

    @property
    def lengths(self) -> list[tuple[int, bool]]:
        return [(len(s.token_ids), s.finished) for s in self.sampled]


def _write(target: Target, prompts: list[list[int]], kinds: list[SamplingParams], seconds: float) -> _Written:
    """One row a prompt, all at once, up to as many tokens as the time is likely to allow."""
    sampler, limit, slots = BatchSampler(target), kinds[0].max_new_tokens, len(prompts)

    def run(some: list[list[int]], tokens: int) -> tuple[list[Sampled], float, float]:
        """What was written, and the seconds before and after the first tokens."""
        params = [
            replace(kinds[i % len(kinds)], max_new_tokens=tokens, seed=derive_seed("plan", kinds[0].seed, i))
            for i in range(len(some))
        ]
        started, first = time.perf_counter(), 0.0

        def note(count: int) -> None:
            nonlocal first
            first = first or time.perf_counter()

        sampled = sampler.sample(some, params, len(some), note)
        return sampled, first - started, time.perf_counter() - first

    began = time.perf_counter()
    run(prompts[:1], 1)
    few = min(limit, 4)
    _, reading, writing = run(prompts[:2], few)
    per_token = reading / sum(len(prompt) for prompt in prompts[:2])
    # A step costs what a short one costs, and more for every row; how much more is not known yet.
    step = writing / max(1, few - 1) + 3 * slots * per_token
    left = seconds - (time.perf_counter() - began) - per_token * sum(len(prompt) for prompt in prompts)
    sampled, reading, writing = run(prompts, min(limit, max(few, 1 + int(left / step))))
    # The first guess is a careful one. Where it left much time, a longer look tells more about the lengths.
    steps = max(len(s.token_ids) for s in sampled)
    left = seconds - (time.perf_counter() - began) - reading
    affordable = min(limit, 1 + int(left * max(1, steps - 1) / writing)) if writing else 0
    if affordable > 1.5 * steps and not all(s.finished for s in sampled):
        sampled, reading, writing = run(prompts, affordable)
    written = sum(len(s.token_ids) for s in sampled) - slots
    read = Rate(sum(len(prompt) for prompt in prompts), reading)
    return _Written(sampled, read, Rate(written, writing) if written else Rate(slots, reading))


def joined(samples: Sequence[TokenSample], length: int) -> list[TokenSample]:
    """Samples end to end, in rows of `length` tokens; as they are where they are about as long themselves."""
    whole = sum(len(s.input_ids) for s in samples)
    if whole >= 0.8 * length * len(samples) or whole < length:
        return list(samples)
    ids = [token for s in samples for token in s.input_ids]
    mask = [flag for s in samples for flag in s.loss_mask]
    cuts = range(0, len(ids) - length + 1, length)
    return [TokenSample(str(i), ids[i : i + length], mask[i : i + length]) for i in cuts]


def measure_extraction(
    config: RunConfig, target: Target, method: DraftMethod, rows: Sequence[TokenSample], folder: Path, seconds: float
) -> tuple[FeatureStore, Rate]:
    """Features of as many of `rows` as are likely to fit, in a store under `folder`, by one process: this one."""
    spec = method.feature_spec(target.spec)
    threads = threads_for(target.device.type)

    def run(some: list[TokenSample], name: str) -> Rate:
        tokens = sum(len(s.input_ids) for s in some)
        # Small shards, so that every thread has some, as it will in the run.
        changes = {"workers": 0, "engine": TransformersEngine(), "shard_tokens": max(256, tokens // (2 * threads))}
        started = time.perf_counter()
        extract(target, some, spec, config.extract.model_copy(update=changes), folder / name, NoProgress())
        return Rate(tokens, time.perf_counter() - started)

    first = run(_up_to(rows, WARM_UP_TOKENS), "warm-up")
    second = run(_up_to(rows, first.per_second * (seconds - first.seconds)), "features")
    return FeatureStore(folder / "features"), second


def packed_shares(store: FeatureStore) -> dict[str, float]:
    """Share of the plain bytes that zstd leaves, by codec, with the store's kind of teacher."""
    origin, shares = store.origin, dict[str, float]()
    hidden = origin.target.hidden_size
    some = [store[i] for i in range(max(1, min(len(store), PACKED_TOKENS * len(store) // store.tokens)))]
    for codec in CODECS:
        record = Record(hidden * len(origin.layers), hidden, origin.target.vocab_size, codec, origin.teacher)
        tensors = [tensor for row in some for tensor in record.encode(row).values()]
        shares[codec] = sum(compress(t).numel() for t in tensors) / sum(t.numel() * t.element_size() for t in tensors)
    return shares


def _trainer(config: RunConfig, method: TrainableMethod, features: FeatureSource, folder: Path) -> Trainer:
    changes = {
        "steps": 1000,  # more than there is time for
        "epochs": None,
        "validation_conversations": min(config.train.validation_conversations, max(1, len(features.ids) // 4)),
        "trackers": (),
    }
    quick = config.train.model_copy(update=changes)
    return Trainer(features, method, config.method, quick, folder / "training", config.seed)


def measure_training(trainer: Trainer, seconds: float) -> Rate:
    """Optimiser steps of one micro-batch each, data loading included."""
    started = time.perf_counter()
    trainer.train_step()
    tokens, first = trainer.progress.trained_tokens, time.perf_counter()
    while trainer.progress.trained_tokens == tokens or time.perf_counter() - started < seconds:
        trainer.train_step()
        if trainer.progress.step == len(trainer.plan):
            break
    return Rate(trainer.progress.trained_tokens - tokens, time.perf_counter() - first)


def measure_validation(trainer: Trainer) -> Rate | None:
    """One pass over the held-out conversations; None without any."""
    if not trainer.held_out:
        return None
    started = time.perf_counter()
    trainer.validate()
    tokens = sum(trainer.source.lengths[i] for i in trainer.held_out)
    return Rate(tokens, time.perf_counter() - started)


def measure_rollouts(
    config: RunConfig, target: Target, head: DraftHead, rows: Sequence[TokenSample], seconds: float
) -> Rate | None:
    """Tokens that rollouts with all slots emit, by the phase itself; None where no row has a prompt."""
    how = config.on_policy
    assert how is not None and isinstance(head.method, TrainableMethod)
    depth = how.depth or head.method.positions
    starts = [(row, sketch_of(row).contexts[0]) for row in rows if any(row.loss_mask)]
    room = target.context - how.max_new_tokens
    prompts = [TokenSample(row.id, row.input_ids[:n], [False] * n) for row, n in starts if 0 < n <= room]
    if not prompts:
        return None
    prompts = [prompts[i % len(prompts)] for i in range(how.slots)]

    def run(tokens: int) -> Rate:
        few = how.model_copy(update={"max_new_tokens": tokens})
        started = time.perf_counter()
        made = roll_out(target, head, prompts, depth, few, 0, NoProgress())
        return Rate(sum(sum(one.sample.loss_mask) for one in made), time.perf_counter() - started)

    first = run(min(ROLLED_OUT_TOKENS, how.max_new_tokens))
    longer = int(ROLLED_OUT_TOKENS * (seconds - first.seconds) / first.seconds)
    return run(min(longer, how.max_new_tokens)) if longer > ROLLED_OUT_TOKENS else first


def measure_passes(config: RunConfig, target: Target, head: DraftHead) -> dict[str, float]:
    """Seconds a pass of each arm of the evaluation, by the evaluation itself on one prompt and a few tokens."""
    few = min(EVALUATED_TOKENS, config.eval.max_new_tokens)
    changes = {"prompts": 1, "repeats": 1, "max_new_tokens": few, "temperatures": config.eval.temperatures[:1]}
    rows = evaluate(target, head, config.eval.model_copy(update=changes), NoProgress(), config.seed)
    return {
        row.arm: (row.draft_ms + row.verify_ms) / 1e3 for row in rows if row.category == ALL and row.accepted_length
    }


def _up_to(rows: Sequence[TokenSample], tokens: float) -> list[TokenSample]:
    """The first rows, at least one, until they hold `tokens`."""
    chosen: list[TokenSample] = []
    held = 0
    for row in rows:
        if chosen and held >= tokens:
            break
        chosen.append(row)
        held += len(row.input_ids)
    return chosen
