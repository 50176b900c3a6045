"""All drafting methods on one data set at one budget: what each costs to train, and what it gives.

    python scripts/compare_methods.py --out runs/compare [--steps 240] [--budgets steps flops] [--methods eagle3 medusa]

Every method is set as in the configuration that comes with it (`SETTINGS` says what differs) and trains on the same
conversations in the same order, from one feature store that holds all their layers.
`--steps` optimiser steps are one budget; the other is the FLOPs that EAGLE-3 takes for them (matrix products, forward
and backward, counted in one step). Training is timed in seconds of the processor too, which other work on the machine
hardly changes. Then all heads of a budget decode the same prompts in turn, beside plain decoding,
prompt lookup and suffix lookup, as in `sstf eval`. What is there is not made again; delete its folder to repeat it.

Prints JSON lines, and writes them to OUT/lines.jsonl, with OUT/table-BUDGET.md and OUT/pareto-BUDGET.svg, the accepted
length against the cost of a draft, made of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

matplotlib.use("svg")
from matplotlib import pyplot as plt
from torch.utils.flop_counter import FlopCounterMode

from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.progress import NoProgress, Progress
from sstf.data.tokens import TokenStore
from sstf.evaluation import EvalConfig, Row, compare_heads, hardware
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, SelectedLayers, extract
from sstf.methods import METHODS, SuffixConfig, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import DraftHead, load_head
from sstf.pipeline import Run
from sstf.progress_display import display
from sstf.targets import Target, TargetConfig, load_configured
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer
from sstf.trees import Chain, DynamicTree

REFERENCE = "eagle3"  # whose FLOPs are the second budget
CONFIGS = Path(__file__).parent.parent / "configs" / "smollm2-135m-instruct"
# What is not as in the configuration that comes with the method: one draft vocabulary, and eight positions at least
# where a head cannot draft further than it was trained for.
SETTINGS: dict[str, list[str]] = {
    "eagle": ["method.draft_vocab_size=8192"],
    "eagle3": ["method.draft_vocab_size=8192", "method.ttt_steps=3"],
    "p_eagle": ["method.draft_vocab_size=8192", "method.depth=8"],
    "medusa": ["method.draft_vocab_size=8192"],
    "dflash": ["method.draft_vocab_size=8192", "method.block_size=9"],
    "domino": ["method.draft_vocab_size=8192", "method.block_size=9"],
    "dspark": ["method.draft_vocab_size=8192", "method.block_size=8"],
    "early_exit": ["method.draft_vocab_size=8192"],
}
POLICIES = {
    "chain 4": Chain(depth=4),
    "chain 8": Chain(depth=8),
    "tree": DynamicTree(depth=4, top_k=4, total_tokens=12),
}


def config_of(kind: str) -> RunConfig:
    return load(RunConfig, CONFIGS / f"{kind}.yaml", SETTINGS[kind])


class Lines:
    """Printed and kept; a line of the same key is not made twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )

    def add(self, **figures: Any) -> None:
        self.rows.append(figures)
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)


# ---- data ------------------------------------------------------------------------------------------------------------


def features(target: Target, kinds: Iterable[str], args: argparse.Namespace, progress: Progress) -> FeatureStore:
    """The layers of all methods, of the packaged conversations."""
    data = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=args.conversations)
    run = Run(
        RunConfig(name="compare", output_dir=args.out, target=TargetConfig(name=args.target), data=data), progress
    )
    run.up_to("data")
    layers = {
        layer for kind in kinds for layer in build_method(config_of(kind).method).feature_spec(target.spec).layers
    }
    folder = args.out / "features"
    if (folder / "manifest.json").is_file() and layers <= set((store := FeatureStore(folder)).layers):
        return store
    samples = TokenStore(run.folder("data")).read()
    extract(target, samples, FeatureSpec(tuple(sorted(layers))), ExtractConfig(codec="bf16"), folder, progress)
    return FeatureStore(folder)


# ---- training --------------------------------------------------------------------------------------------------------


def trainer_of(kind: str, store: FeatureStore, steps: int, folder: Path, args: argparse.Namespace) -> Trainer:
    config = config_of(kind)
    method = build_method(config.method)
    assert isinstance(method, TrainableMethod)
    source = SelectedLayers(store, method.feature_spec(store.target).layers)
    train = TrainConfig(
        steps=steps,
        optimizer=config.train.optimizer,
        schedule=config.train.schedule,
        validation_conversations=32,
        validate_every=max(1, steps // 4),
        checkpoint_every=max(1, steps // 4),
        batch_tokens=1024,
    )
    return Trainer(source, method, config.method, train, folder, args.seed)


def flops_of_a_step(kind: str, store: FeatureStore, args: argparse.Namespace) -> int:
    """Matrix products of one step, forward and backward."""
    trainer = trainer_of(kind, store, args.steps, args.out / "flops" / kind, args)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    return int(counter.get_total_flops())


def folder_of(kind: str, steps: int, args: argparse.Namespace) -> Path:
    return Path(args.out) / "heads" / f"{kind}-{steps}"


def train(kind: str, steps: int, store: FeatureStore, args: argparse.Namespace, lines: Lines) -> None:
    if lines.find(bench="training", method=kind, steps=steps):
        return
    folder = folder_of(kind, steps, args)
    trainer = trainer_of(kind, store, steps, folder, args)
    parameters = sum(p.numel() for p in trainer.module.head.parameters())
    started, before = time.perf_counter(), time.process_time()
    summary = trainer.run(NoProgress(), folder.name, {})
    cpu_seconds = time.process_time() - before
    lines.add(
        bench="training",
        method=kind,
        settings=trainer.method_config.model_dump(mode="json"),
        parameters=parameters,
        steps=steps,
        tokens=summary["trained_tokens"],
        tokens_per_second=summary["tokens_per_second"],
        tokens_per_cpu_second=round(summary["trained_tokens"] / cpu_seconds, 1),
        seconds=round(time.perf_counter() - started, 1),
        simulated_accepted_length=round(summary["accepted_length"], 3),
        draft_vocab_coverage=round(summary["draft_vocab_coverage"], 4),
    )


def steps_of(budget: str, kind: str, store: FeatureStore, args: argparse.Namespace, lines: Lines) -> int:
    """Optimiser steps that a method has at a budget."""
    for one in (REFERENCE, kind):
        if not lines.find(bench="flops", method=one):
            lines.add(bench="flops", method=one, step=flops_of_a_step(one, store, args))
    if budget == "steps":
        return int(args.steps)
    reference, own = (lines.find(bench="flops", method=one) for one in (REFERENCE, kind))
    assert reference and own
    return max(1, round(args.steps * reference["step"] / own["step"]))


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(target: Target, budget: str, steps: Mapping[str, int], args: argparse.Namespace, lines: Lines) -> None:
    """All heads of a budget, interleaved, so that a change of the machine's speed hits all alike."""
    if lines.find(bench="decoding", budget=budget):
        return
    heads = {kind: load_head(folder_of(kind, own, args) / "head", target) for kind, own in steps.items()}
    heads |= {"suffix": DraftHead("suffix", build_method(SuffixConfig()))}
    config = EvalConfig(
        prompts=args.prompts, max_new_tokens=args.max_new_tokens, repeats=args.repeats, policies=POLICIES
    )
    for row in compare_heads(target, heads, config, display(Console()), args.seed):
        if row.category == "all":
            head, _, policy = row.arm.partition(": ")
            lines.add(bench="decoding", budget=budget, method=head, policy=policy, **figures(row))


def figures(row: Row) -> dict[str, Any]:
    names = ("temperature", "prompts", "accepted_length", "accepted_length_ci", "speedup", "speedup_ci")
    names += ("tokens_per_second", "draft_ms", "verify_ms", "host_ms", "identical", "void")
    kept = {name: value for name, value in asdict(row).items() if name in names}
    return {
        name: [round(v, 4) for v in value] if isinstance(value, list | tuple) else
        round(value, 4) if isinstance(value, float) else value
        for name, value in kept.items()
    }  # fmt: skip


# ---- what is read ----------------------------------------------------------------------------------------------------


def table(lines: Lines, budget: str, steps: Mapping[str, int]) -> str:
    """Markdown: a row a method, accepted length (interval) and speedup by temperature and policy."""
    columns = [(temperature, policy) for temperature in (0.0, 1.0) for policy in POLICIES]
    head = ["method", "parameters", "steps", "training tokens / CPU s", "ms a draft, chain 4"]
    head += [f"T={temperature:g}, {policy}" for temperature, policy in columns]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = [row for row in lines.rows if row["bench"] == "decoding" and row["budget"] == budget]
    for method in dict.fromkeys(row["method"] for row in rows):
        # Plain decoding and prompt lookup have one way to draft, which stands in the first column.
        own = {(row["temperature"], row["policy"] or "chain 4"): row for row in rows if row["method"] == method}
        made = lines.find(bench="training", method=method, steps=steps.get(method))
        cells = [method, *(["–"] * 3)]
        if made:
            cells[1:] = [
                f"{made['parameters'] / 1e6:.1f} M",
                str(made["steps"]),
                f"{made['tokens_per_cpu_second']:,.0f}",
            ]
        chain = own.get((0.0, "chain 4"))
        cells.append(f"{chain['draft_ms']:.1f}" if chain and method != "plain" else "–")
        cells += [_cell(own.get(column)) for column in columns]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    low, high = row["accepted_length_ci"]
    text = f"{row['accepted_length']:.2f} ({low:.2f} to {high:.2f}), {row['speedup']:.2f}x"
    return f"{text}, void: {row['void'].split(':')[0]}" if row["void"] else text


def pareto(lines: Lines, budget: str, path: Path) -> None:
    """Accepted length against the cost of a draft; up and to the left is better."""
    plain = lines.find(bench="decoding", budget=budget, method="plain", temperature=0.0)
    rows = [
        row
        for row in lines.rows
        if row["bench"] == "decoding" and row["budget"] == budget and row["temperature"] == 0.0
        and row["method"] != "plain"
    ]  # fmt: skip
    if plain is None or not rows:
        return
    step = 1e3 / plain["tokens_per_second"]
    plt.rcParams.update({"svg.hashsalt": "sstf", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    chart, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    marks = dict(zip(["", *POLICIES], "Dos^", strict=True))
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for row in rows:
        x, y = row["draft_ms"] / step, row["accepted_length"]
        axes.plot(x, y, marks[row["policy"]], color=colours[row["method"]], ms=5)
        axes.annotate(
            f"{row['method']} {row['policy']}".strip(), (x, y), (3, 3), textcoords="offset points", fontsize=6
        )
    axes.set(xlabel="drafting a pass / plain step", ylabel="accepted length, greedy")
    axes.set_title(f"equal {budget}, {plain['prompts']} prompts", fontsize=9)
    chart.savefig(path, metadata={"Date": None, "Creator": "scripts/compare_methods.py"})
    plt.close(chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--conversations", type=int, default=None, help="default: all that the package brings")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--budgets", nargs="+", default=["steps", "flops"], choices=["steps", "flops"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trained = {kind for kind, (config, _) in METHODS.items() if isinstance(build_method(config()), TrainableMethod)}
    missing = trained - set(SETTINGS)
    assert not missing, f"SETTINGS lacks {sorted(missing)}"
    args.out.mkdir(parents=True, exist_ok=True)
    lines, progress = Lines(args.out / "lines.jsonl"), display(Console())
    target = load_configured(TargetConfig(name=args.target))
    if not lines.find(bench="machine"):
        lines.add(bench="machine", target=args.target, dtype=target.spec.dtype, **hardware())
    store = features(target, args.methods, args, progress)
    steps = {
        budget: {kind: steps_of(budget, kind, store, args, lines) for kind in args.methods} for budget in args.budgets
    }
    for own in steps.values():
        for kind, number in own.items():
            train(kind, number, store, args, lines)
    for budget, own in steps.items():
        decode(target, budget, own, args, lines)
        made = table(lines, budget, own)
        (args.out / f"table-{budget}.md").write_text(made + "\n")
        pareto(lines, budget, args.out / f"pareto-{budget}.svg")
        print(made)


if __name__ == "__main__":
    main()
