"""Speed and memory of training on this machine, as JSON lines; `bench_data.py` measures what comes before it.

    python scripts/bench_train.py [--quick] [--threads N] [--folder DIR]
    scripts/compare_speculators.sh [--quick] [--threads N] [--folder DIR]  # beside speculators 0.9.0

EAGLE-3 on the embedded target, rows of 1,024 tokens: sample conversations joined end to end, so that every step is a
full one. Each training is a process of its own (`train_once.py`, `compare_speculators.py`), so that its peak resident
memory is its own. The contestants run in turn, several rounds; `training` lines give each run, `summary` lines the
median over the rounds and its range, `ratio` lines what is compared. The rate of bf16 matrix products is measured in
every round too: the machine may be shared. CPU seconds, all threads together, suffer less from others than the clock
does. `--folder` keeps the extracted features for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from train_work import mflop_per_token, roofline

from sstf.data.chat_template import render
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.conversations import read_conversations
from sstf.data.progress import NoProgress
from sstf.evaluation import hardware
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, extract, split
from sstf.features.vocabulary import token_counts
from sstf.methods import Eagle3Config, build_method
from sstf.targets import Target, load_target, locate
from sstf.targets.draft_vocab import choose_draft_vocab
from sstf.types import Conversation, TokenSample

SCRIPTS = Path(__file__).parent
TARGET = "smollm2-135m-instruct"
LENGTH, ROWS, DRAFT_VOCAB = 1024, 24, 8192
WARM_UP = 2  # steps that are not timed
TTT_STEPS = (3, 7)
SSTF, SPECULATORS = "sstf", "speculators 0.9.0"
OPTIMIZER = "adamw"
Runs = dict[tuple[str, int], list[dict[str, Any]]]  # by trainer and TTT steps, one entry a round


def emit(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def rows_of(target: Target) -> list[TokenSample]:
    config = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=100)
    conversations = [c for c in read_conversations(config).conversations if isinstance(c, Conversation)]
    samples = [render(target.tokenizer, c, LENGTH) for c in conversations]
    ids = [token for s in samples for token in s.input_ids]
    mask = [flag for s in samples for flag in s.loss_mask]
    starts = range(0, len(ids) - LENGTH + 1, LENGTH)
    rows = [TokenSample(str(i), ids[i : i + LENGTH], mask[i : i + LENGTH]) for i in starts][:ROWS]
    assert len(rows) == ROWS, f"the sample gives {len(rows)} rows of {LENGTH} tokens, expected {ROWS}"
    return rows


def extract_rows(target: Target, rows: list[TokenSample], folder: Path) -> FeatureStore:
    spec = build_method(Eagle3Config()).feature_spec(target.spec)
    extract(target, rows, spec, ExtractConfig(), folder, NoProgress())
    return FeatureStore(folder)


def write_for_speculators(target: Target, store: FeatureStore, folder: Path, python: Path) -> None:
    """The same rows in the form that speculators reads: one file a row with the three taps and the last hidden states
    BEFORE the final norm (it norms them itself), the Arrow data set, and the same draft vocabulary."""
    last = target.spec.num_layers - 1
    raw = folder / "with-last-layer"
    rows = [_tokens_of(store, i) for i in range(len(store))]
    extract(target, rows, FeatureSpec((*store.layers, last)), ExtractConfig(), raw, NoProgress())
    with_last = FeatureStore(raw)
    (folder / "hidden_states").mkdir(parents=True, exist_ok=True)
    hidden = target.spec.hidden_size
    for i, row in enumerate(rows):
        states = with_last[i].features
        ours = store[i].features
        assert (states[:, : ours.shape[1]] == ours).all(), "the two extractions differ"
        save_file(
            {"hidden_states": states.unflatten(1, (-1, hidden)).contiguous(), "token_ids": with_last[i].input_ids},
            folder / "hidden_states" / f"hs_{i}.safetensors",
        )
        assert with_last[i].input_ids.tolist() == row.input_ids
    chosen = choose_draft_vocab(token_counts(store, split(store, 0, 0)[0]), DRAFT_VOCAB).numpy()
    np.save(folder / f"d2t-{DRAFT_VOCAB}.npy", chosen - np.arange(DRAFT_VOCAB))
    np.save(folder / f"t2d-{DRAFT_VOCAB}.npy", np.isin(np.arange(target.spec.vocab_size), chosen))
    columns = [{"input_ids": row.input_ids, "loss_mask": [int(flag) for flag in row.loss_mask]} for row in rows]
    (folder / "rows.json").write_text(json.dumps(columns))
    subprocess.run([python, SCRIPTS / "compare_speculators.py", "dataset", folder], check=True)


def _tokens_of(store: FeatureStore, i: int) -> TokenSample:
    ids, mask = store.tokens_of(i)
    return TokenSample(store.ids[i], ids.tolist(), mask.tolist())


def train_here(store: Path, ttt_steps: int, steps: int, threads: int) -> dict[str, Any]:
    numbers = {"--ttt-steps": ttt_steps, "--draft-vocab": DRAFT_VOCAB, "--warm-up": WARM_UP, "--steps": steps}
    return _figures_of([sys.executable, SCRIPTS / "train_once.py", store, *sum(numbers.items(), ())], threads)


def train_speculators(python: Path, data: Path, ttt_steps: int, steps: int, threads: int) -> dict[str, Any]:
    """One run of `speculators train` as near to ours as its options allow; `docs/benchmarks.md` says what differs."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "verifier-name-or-path": locate(TARGET),
            "data-path": data,
            "speculator-type": "eagle3",
            "draft-attn-impl": "sdpa",
            "full-attention-indices": 0,
            "loss-implementation": "eager",
            "ttt-steps": ttt_steps,
            "ttt-step-loss-decay": 0.8,
            "draft-vocab-size": DRAFT_VOCAB,
            "total-seq-len": LENGTH,
            "train-data-ratio": (ROWS + 0.5) / (ROWS + 1),
            "on-missing": "raise",
            "num-workers": 0,
            "optimizer": OPTIMIZER,
            "lr": 1e-4,
            "weight-decay": 0,
            "save-path": f"{scratch}/checkpoints",
            "log-dir": f"{scratch}/logs",
        }
        command = [python, SCRIPTS / "compare_speculators.py", "train", WARM_UP, steps]
        command += ["--target-layer-ids", "2", "15", "27"]  # ours counts layer OUTPUTS from 0: 1, 14, 26
        command += ["--no-norm-before-residual", "--no-norm-before-fc", "--no-norm-output"]
        command += ["--no-resume-from-checkpoint"]
        command += [f"--{name}={value}" for name, value in options.items()]
        figures = _figures_of(command, threads)
    return {"tokens_per_second": round(LENGTH / figures["seconds_a_step"], 1), **figures}


def _figures_of(command: list[Any], threads: int) -> dict[str, Any]:
    """The JSON line that a training prints last."""
    # Where others use the machine too, a thread that spins while it waits takes the core from what it waits for.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["threads"] == threads, f"it used {figures['threads']} threads, expected {threads}"
    return figures


def summarise(runs: Runs, work: dict[tuple[str, int], float], bare: float, square: float) -> None:
    """Median and range over the rounds. `work` in MFLOP a token, rates in GFLOP/s."""
    for (trainer, ttt_steps), rounds in runs.items():
        speeds = [figures["tokens_per_second"] for figures in rounds]
        over_import = [figures["peak_rss_gib"] - figures["rss_after_import_gib"] for figures in rounds]
        achieved = statistics.median(speeds) * work[trainer, ttt_steps] / 1000
        emit(
            bench="summary",
            trainer=trainer,
            ttt_steps=ttt_steps,
            draft_vocab=DRAFT_VOCAB,
            length=LENGTH,
            optimizer=OPTIMIZER,
            rounds=len(rounds),
            tokens_per_second=statistics.median(speeds),
            tokens_per_second_range=[min(speeds), max(speeds)],
            seconds_a_step=statistics.median(figures["seconds_a_step"] for figures in rounds),
            cpu_seconds_a_step=statistics.median(figures["cpu_seconds_a_step"] for figures in rounds),
            gflop_per_token=round(work[trainer, ttt_steps] / 1000, 4),
            gflop_per_second=round(achieved, 1),
            share_of_bare_products=round(achieved / bare, 3),
            share_of_square_product=round(achieved / square, 3),
            peak_rss_gib=statistics.median(figures["peak_rss_gib"] for figures in rounds),
            peak_over_import_gib=round(statistics.median(over_import), 3),
        )


def compare(threads: int, rounds: int, steps: int, folder: Path, python: Path | None) -> None:
    target = load_target(TARGET)
    store = extract_rows(target, rows_of(target), folder / "store")
    spec = target.spec
    if python:
        write_for_speculators(target, store, folder / "speculators", python)
    del target  # others train now, and need the memory
    supervised = sum(store.trained) / sum(store.lengths)
    emit(bench="machine", target=spec.name, dtype=spec.dtype, supervised=round(supervised, 3), **hardware())
    trainers = (SSTF, SPECULATORS) if python else (SSTF,)
    runs: Runs = {(trainer, ttt_steps): [] for ttt_steps in TTT_STEPS for trainer in trainers}
    rates: list[tuple[float, float]] = []
    for turn in range(rounds):
        rates.append(roofline(spec, TTT_STEPS[0], DRAFT_VOCAB, LENGTH, supervised, threads))
        emit(bench="roofline", round=turn, threads=threads, bare_products_gflop_per_second=rates[-1][0],
             square_product_gflop_per_second=rates[-1][1])  # fmt: skip
        for trainer, ttt_steps in runs:
            if trainer == SSTF:
                figures = train_here(folder / "store", ttt_steps, steps, threads)
            else:
                assert python
                figures = train_speculators(python, folder / "speculators", ttt_steps, steps, threads)
            runs[trainer, ttt_steps].append(figures)
            emit(bench="training", round=turn, trainer=trainer, ttt_steps=ttt_steps, **figures)
    bare, square = (statistics.median(column) for column in zip(*rates, strict=True))
    work = {
        # speculators keeps its lm_head frozen.
        (trainer, n): mflop_per_token(spec, n, DRAFT_VOCAB, LENGTH, supervised, lm_head_trained=trainer == SSTF)
        for trainer, n in runs
    }
    summarise(runs, work, bare, square)
    ratios(runs)


def ratios(runs: Runs) -> None:
    """Medians of the ratios within a round, beside the goals."""

    def ratio(what: str, key: str, over: tuple[str, int], under: tuple[str, int], goal: str | None) -> None:
        pairs = [a[key] / b[key] for a, b in zip(runs[over], runs[under], strict=True)]
        emit(bench="ratio", what=what, ratio=round(statistics.median(pairs), 3), range=[round(min(pairs), 3),
             round(max(pairs), 3)], goal=goal)  # fmt: skip

    speed, peak = "tokens_per_second", "peak_rss_gib"
    ratio("tokens/s, TTT 7 over TTT 3", speed, (SSTF, 7), (SSTF, 3), ">= 0.5")
    for n in TTT_STEPS if (SPECULATORS, 3) in runs else ():
        us, them, versus = (SSTF, n), (SPECULATORS, n), f"sstf over speculators, TTT {n}"
        ratio(f"tokens/s, {versus}", speed, us, them, ">= 1.5" if n == 3 else None)
        ratio(f"CPU seconds a step, {versus}", "cpu_seconds_a_step", us, them, None)
        ratio(f"peak memory, {versus}", peak, us, them, "<= 0.6" if n == 3 else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of a third of the steps: figures are rougher")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contestant")
    parser.add_argument("--folder", type=Path, help="keep the features here (default: a temporary folder)")
    parser.add_argument("--against-speculators", type=Path, metavar="PYTHON", help="see compare_speculators.sh")
    args = parser.parse_args()
    rounds, steps = (1, 4) if args.quick else (3, 12)
    with tempfile.TemporaryDirectory() as scratch:
        compare(args.threads, rounds, steps, args.folder or Path(scratch), args.against_speculators)


if __name__ == "__main__":
    main()
