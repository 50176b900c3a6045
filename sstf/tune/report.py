"""A plan for people and for engines: a table, launch lines, a figure, JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.data.atomic import write_json_atomic
from sstf.evaluation.charts import lines
from sstf.evaluation.plot_files import write_plots
from sstf.formats import engines_of, sglang_algorithm, speculative_config
from sstf.machine import hardware
from sstf.tune.plan import PLAIN, Choice, Measured, Shape, TunePlan, speedup

FORMAT = 1


def schedule(choices: Sequence[Choice]) -> list[list[int]]:
    """vLLM's `num_speculative_tokens_per_batch_size`: [first size, last size, tokens], inclusive, without gaps.

    A measured batch size stands for those above the next smaller one. Of several context lengths the first counts.
    """
    context = choices[0].context
    ranges: list[list[int]] = []
    before = 0
    for one in sorted((c for c in choices if c.context == context), key=lambda c: c.batch):
        if ranges and ranges[-1][2] == one.shape.depth:
            ranges[-1][1] = one.batch
        else:
            ranges.append([before + 1, one.batch, one.shape.depth])
        before = one.batch
    return ranges


def launch_lines(found: TunePlan, target: str, head: str, kind: str) -> list[str]:
    """Shell lines that export the head and serve it with vLLM, whose drafts are chains, and with SGLang.

    vLLM 0.24 and later take another depth for each batch size; SGLang takes one shape, and counts the root among its
    draft tokens. An engine that does not know the method, `kind`, has a line that says so.
    """
    quoted, model = shlex.quote(head), shlex.quote(target)
    by_batch = schedule(found.chains)
    deepest = max(depth for _, _, depth in by_batch)
    out = []
    if "vllm" not in engines_of(kind):
        out.append(f"# vLLM does not know method {kind}")
    elif deepest:
        settings = speculative_config(kind, f"{head}-vllm", deepest)
        if len(by_batch) > 1:
            settings["num_speculative_tokens_per_batch_size"] = by_batch
        out += [
            f"sstf export {quoted} --to vllm",
            f"vllm serve {model} --speculative-config {shlex.quote(json.dumps(settings))}",
        ]
    else:
        out.append(f"vllm serve {model}  # no depth pays at any measured batch size")
    shape, algorithm = found.one_tree, sglang_algorithm(kind)
    if algorithm is None:
        out.append(f"# SGLang does not know method {kind}")
    elif shape == PLAIN:
        out.append(f"python -m sglang.launch_server --model-path {model}  # no draft pays over all batch sizes")
    else:
        out += [
            f"sstf export {quoted} --to sglang",
            f"python -m sglang.launch_server --model-path {model} --speculative-algorithm {algorithm} "
            f"--speculative-draft-model-path {shlex.quote(head + '-sglang')} --speculative-num-steps {shape.depth} "
            f"--speculative-eagle-topk {shape.width} --speculative-num-draft-tokens {shape.nodes + 1}",
        ]
    return out


def print_plan(found: TunePlan, measured: Measured, commands: Sequence[str], out: Console) -> None:
    """The choices, the break-even batch and the launch lines."""
    table = Table(title="best draft by batch size and context length", title_justify="left")
    for heading in ("batch", "context", "chain", "accepted", "speedup", "tree", "accepted", "speedup"):
        table.add_column(heading, justify="left" if heading in ("chain", "tree") else "right")
    for chain, tree in zip(found.chains, found.trees, strict=True):
        table.add_row(str(chain.batch), str(chain.context), *_cells(chain), *_cells(tree))
    out.print(table)
    largest = max(batch for batch, _ in measured.costs)
    for context, batch in found.break_even.items():
        if batch == 0:
            what = "drafting pays at no measured batch size"
        elif batch == largest:
            what = f"drafting pays up to batch {batch} at least, the largest measured"
        else:
            what = f"break-even batch {batch}: drafting pays up to there"
        out.print(Text(f"context {context}: {what}"), soft_wrap=True)
    for line in commands:
        out.print(Text(line), soft_wrap=True)


def _cells(one: Choice) -> tuple[str, str, str]:
    return name(one.shape), f"{one.accepted_length:.2f}", f"{one.speedup:.2f}"


def name(shape: Shape) -> str:
    """In words."""
    if shape == PLAIN:
        return "plain"
    return (
        f"depth {shape.depth}" if shape.width == 1 else f"depth {shape.depth}, {shape.width} wide, {shape.nodes} nodes"
    )


def figure(found: TunePlan, measured: Measured) -> str:
    """The map: speedup by batch size of the best draft and of the one for all, for every context length."""
    series: dict[str, list[tuple[float, float]]] = {}
    for (batch, context), cost in sorted(measured.costs.items()):
        best = next(c for c in found.trees if (c.batch, c.context) == (batch, context))
        series.setdefault(f"best, context {context}", []).append((batch, best.speedup))
        for shape in {found.one_chain: 0, found.one_tree: 0}:
            if shape != PLAIN:
                value = speedup(cost, shape, measured.accepted_lengths[shape])
                series.setdefault(f"{name(shape)}, {context}", []).append((batch, value))
    series["plain"] = [(batch, 1.0) for batch in sorted({batch for batch, _ in measured.costs})]
    return lines(series, "Speedup by batch size (cost model)", "sequences at once", "speedup", doubling=True)


def write_plan(
    folder: Path, found: TunePlan, measured: Measured, commands: Sequence[str], note: Callable[[str], None]
) -> Path:
    """`tune.json`, `tune.svg` and `tune.png`, or a note why there is no PNG; returns the figure to show."""
    lengths = [asdict(shape) | {"accepted_length": tau} for shape, tau in measured.accepted_lengths.items()]
    costs = [
        {"batch": batch, "context": context, **cost.to_json()} for (batch, context), cost in measured.costs.items()
    ]
    content = {
        "format": FORMAT,
        "hardware": hardware(),
        **asdict(found),
        "launch": list(commands),
        "accepted_lengths": lengths,
        "costs": costs,
    }
    write_json_atomic(folder / "tune.json", content)
    return folder / write_plots(folder, {"tune": figure(found, measured)}, note)["tune"]
