"""What each way of storing features costs and loses, on the real features of a target, as JSON lines.

    python scripts/bench_codecs.py [--quick]                    size, speed and error of each
    python scripts/bench_codecs.py --accepted-length [--quick]  a head trained on each, all judged on the same features

`KEY=VALUE` arguments override the configuration (`data.max_conversations=100`).

Everything is derived from one store in bf16 with the last hidden states, which for a bfloat16 target is exact; the
others are written from it, as extraction would have written them. The settings of data and training are those of the
configuration (demo.yaml), seed and order of the conversations included.

Size and speed: `bytes_per_token` counts whole shards, names and all; `percent_of_8h` compares them with 8 bytes a token
and channel of the target (bf16, three taps and the last state). Writing is encoding, compression, checksum and a synced
file. Reading is batches of conversations in random order, decoded and collated; `first_read` includes the checksum of
each shard. MB are 10^6 stored bytes.

Error: `error_*` are |decoded - exact| / |exact| of a token's taps, or of its last hidden state. `teacher_kl` is, over
the trained positions, the mean of KL(target || target through the codec); for top-k of KL(top k renormalised || target)
= -log of the mass that the top k hold. `lost_mass` is the mean of that which they do not hold.

Accepted length: the head after its last step, on the held-out conversations of the bf16 store; `lost_percent` is
against the head trained on the bf16 store with the same seed. Rounding differences grow during training, so heads end
apart whatever the codec is worth; several `--seeds` show by how much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sstf.data.progress import NoProgress
from sstf.evaluation import hardware
from sstf.features import FeatureStore, HiddenSignal, Origin, TeacherSignal, TopKSignal, epoch_batches
from sstf.features.codecs import CODECS
from sstf.features.shards import top_k
from sstf.features.store import write_manifest, write_shard
from sstf.methods import TrainableMethod
from sstf.pipeline import Run, load_run
from sstf.targets import FrozenHead
from sstf.train.trainer import Trainer
from sstf.types import HiddenTeacher, TeacherRows, TopKTeacher

ROWS = 128  # of [row, vocab] logits at once


def emit(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def name_of(origin: Origin) -> dict[str, object]:
    signal = origin.teacher
    teacher = f"topk-{signal.k}" if isinstance(signal, TopKSignal) else "hidden"
    return {"codec": origin.codec, "teacher": teacher, "compression": origin.compression}


def as_taught(teacher: TeacherRows, signal: TeacherSignal, frozen: FrozenHead) -> TeacherRows:
    """The last hidden states, or the top k that their logits give."""
    if isinstance(signal, HiddenSignal):
        return teacher
    assert isinstance(teacher, HiddenTeacher)
    tokens, log_probs = [], []
    for rows, lse in zip(teacher.hidden.split(ROWS), teacher.lse.split(ROWS), strict=True):
        logits, ids = top_k(frozen.logits(rows), signal.k)
        tokens.append(ids)
        log_probs.append(logits - lse[:, None])
    return TopKTeacher(torch.cat(tokens), torch.cat(log_probs).half())


def write_as(base: FeatureStore, origin: Origin, frozen: FrozenHead, folder: Path) -> tuple[FeatureStore, float]:
    """The same conversations as `origin` says, and the seconds that writing took."""
    folder.mkdir(parents=True)
    seconds, shards, first = 0.0, [], 0
    for index, shard in enumerate(base.shards):
        rows = [base[i] for i in range(first, first + len(shard.ids))]
        rows = [replace(row, features=row.features.clone()) for row in rows]  # read from disk before the clock runs
        rows = [replace(row, teacher=as_taught(row.teacher, origin.teacher, frozen)) for row in rows]
        started = time.perf_counter()
        shards.append(write_shard(folder, index, shard.ids, rows, origin))
        seconds += time.perf_counter() - started
        first += len(shard.ids)
    frozen.save(folder / "frozen.safetensors")
    write_manifest(folder, origin, shards)
    return FeatureStore(folder), seconds


def read_seconds(store: FeatureStore, repeats: int) -> tuple[float, float]:
    """Of the first pass over a freshly opened store, and the median of later ones."""
    fresh = FeatureStore(store.folder)
    seconds = []
    for epoch in range(1 + repeats):
        batches = epoch_batches(fresh.lengths, 1024, 0, epoch)
        started = time.perf_counter()
        for batch in batches:
            fresh.batch(batch)
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.median(seconds[1:])


def quantiles(name: str, values: list[Tensor]) -> dict[str, float]:
    joined = torch.cat(values)
    return {f"{name}_p{p}": round(float(joined.quantile(p / 100)), 5) for p in (50, 99)}


def relative(found: Tensor, exact: Tensor) -> Tensor:
    return (found.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)


def errors(store: FeatureStore, base: FeatureStore, frozen: FrozenHead) -> dict[str, object]:
    taps, states, divergence, agree, lost = [], [], [], [], []
    for i in range(len(base)):
        found, exact = store[i], base[i]
        taps.append(relative(found.features, exact.features))
        assert isinstance(exact.teacher, HiddenTeacher)
        if isinstance(found.teacher, TopKTeacher):
            mass = found.teacher.log_probs.float().exp().sum(-1).clamp(max=1.0)
            divergence.append(-mass.log())
            lost.append(1 - mass)
            agree.append((found.teacher_token == exact.teacher_token)[exact.teacher_token >= 0].float())
            continue
        states.append(relative(found.teacher.hidden, exact.teacher.hidden))
        for one, other in zip(found.teacher.hidden.split(ROWS), exact.teacher.hidden.split(ROWS), strict=True):
            draft, target = (torch.log_softmax(frozen.logits(rows), -1) for rows in (one, other))
            divergence.append((target.exp() * (target - draft)).sum(-1))
            agree.append((draft.argmax(-1) == target.argmax(-1)).float())
    figures: dict[str, object] = quantiles("error_taps", taps)
    if states:
        figures |= quantiles("error_hidden", states)
    if lost:
        figures["lost_mass"] = round(float(torch.cat(lost).mean()), 5)
    figures["teacher_kl"] = round(float(torch.cat(divergence).mean()), 6)
    figures["teacher_top1"] = round(float(torch.cat(agree).mean()), 4)
    return figures


def variants(base: FeatureStore, codecs: list[str], tops: list[int], compressions: tuple[str, ...]) -> Iterator[Origin]:
    for codec in ("bf16", *(codec for codec in codecs if codec != "bf16")):
        for teacher in (HiddenSignal(), *(TopKSignal(k=k) for k in tops)):
            for compression in compressions:
                yield replace(base.origin, codec=codec, teacher=teacher, compression=compression)


def bench_storage(base: FeatureStore, frozen: FrozenHead, origins: Iterator[Origin], repeats: int) -> None:
    usual = 8 * base.target.hidden_size
    for origin in origins:
        with tempfile.TemporaryDirectory() as folder:
            store, writing = write_as(base, origin, frozen, Path(folder) / "store")
            size = sum(shard.size for shard in store.shards)
            first, reading = read_seconds(store, repeats)
            emit(
                bench="storage",
                **name_of(origin),
                tokens=store.tokens,
                trained_share=round(store.trained_tokens / store.tokens, 4),
                bytes_per_token=round(size / store.tokens, 1),
                percent_of_8h=round(100 * size / store.tokens / usual, 2),
                write_mb_per_second=round(size / writing / 1e6, 1),
                write_tokens_per_second=round(store.tokens / writing),
                first_read_mb_per_second=round(size / first / 1e6, 1),
                read_mb_per_second=round(size / reading / 1e6, 1),
                read_tokens_per_second=round(store.tokens / reading),
                **errors(store, base, frozen),
            )


def accepted_length(run: Run, store: FeatureStore, base: FeatureStore, seed: int) -> tuple[float, int]:
    """Train on `store`, judge on `base`; the figure and the steps."""
    assert isinstance(run.method, TrainableMethod)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(store, run.method, run.config.method, run.config.train, Path(folder), seed)
        while trainer.progress.step < len(trainer.plan):
            trainer.train_step()
        trainer.source = base
        return trainer.validate().simulated_accepted_length, len(trainer.plan)


def bench_accepted_length(
    run: Run, base: FeatureStore, frozen: FrozenHead, origins: Iterator[Origin], seeds: list[int]
) -> None:
    reference: dict[int, float] = {}
    for origin in origins:
        with tempfile.TemporaryDirectory() as folder:
            store, _ = write_as(base, origin, frozen, Path(folder) / "store")
            for seed in seeds:
                started = time.perf_counter()
                found, steps = accepted_length(run, store, base, seed)
                reference.setdefault(seed, found)  # bf16 and hidden come first
                emit(
                    bench="accepted_length",
                    **name_of(origin),
                    seed=seed,
                    steps=steps,
                    simulated_accepted_length=round(found, 4),
                    lost_percent=round(100 * (1 - found / reference[seed]), 2),
                    seconds=round(time.perf_counter() - started),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2-135m-instruct/demo.yaml"))
    parser.add_argument("--accepted-length", action="store_true", help="train a head on each; takes long")
    parser.add_argument("--quick", action="store_true", help="few conversations: figures are rougher")
    parser.add_argument("--codecs", nargs="+", choices=sorted(CODECS), default=["fp8", "int8"], help="beside bf16")
    parser.add_argument("--top-k", type=int, nargs="*", default=[64], help="the k to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--folder", type=Path, help="keeps the bf16 store here, so that a second call finds it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the configuration")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [
            f"output_dir={args.folder or temporary}",
            "extract={codec: bf16, compression: none, teacher: {kind: hidden}}",
        ]
        overrides += args.overrides
        if args.quick:
            overrides += ["data.max_conversations=24", "train.epochs=1", "train.validation_conversations=6"]
        run = load_run(args.config, overrides, NoProgress())
        run.up_to("extract")
        base = FeatureStore(run.folder("extract"))
        frozen = base.frozen_head()
        emit(bench="machine", target=base.target.name, dtype=base.target.dtype, tokens=base.tokens, **hardware())
        if args.accepted_length:
            bench_accepted_length(run, base, frozen, variants(base, args.codecs, args.top_k, ("none",)), args.seeds)
        else:
            origins = variants(base, args.codecs, args.top_k, ("none", "zstd"))
            bench_storage(base, frozen, origins, 2 if args.quick else 5)


if __name__ == "__main__":
    main()
