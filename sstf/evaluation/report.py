"""The evaluation report: `report.json` for machines (`report.schema.json` is its form), `report.md` and `report.html`
for people.

`rejections.json` holds the rejections that are shown one by one, with the text around them: apart, since a report is
published with its head and texts may be private.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.evaluation import tables
from sstf.evaluation.figures import figures
from sstf.evaluation.page import page
from sstf.evaluation.plot_files import write_plots
from sstf.evaluation.run import Evaluation
from sstf.machine import hardware
from sstf.targets import Target

SCHEMA = 2
FORMULAS = {
    "accepted_length": "tokens emitted by verify passes / verify passes (bonus token included; 1 .. depth + 1)",
    "survival": "passes that accepted draft position i / passes",
    "acceptance_rate": "passes that accepted position i / passes that accepted position i - 1",
    "tokens_per_second": "tokens after the first / seconds after the prefill, batch 1",
    "speedup": "tokens_per_second / plain tokens_per_second, same engine, prompts and run; 95 % bootstrap over prompts",
    "draft_ms, verify_ms, host_ms": "milliseconds a verify pass; host is neither drafting nor the target",
    "ceiling": "speedup <= accepted_length",
    "constant_rate": "(1 - a^(depth + 1)) / (1 - a) with a = acceptance_rate of the first position (chains)",
    "draft_cost, verify_cost, host_cost": "seconds a verify pass / seconds a plain pass; "
    "speedup = accepted_length / (draft_cost + verify_cost + host_cost)",
    "vocabulary_cap": "mean target_probs of the draft vocabulary at the new tokens (drawn text: of a sample of "
    "prompts): no acceptance rate can exceed it",
    "tree_oracle": "1 + sum of target_probs along the path over the best nodes of a tree of the same depth and size",
    "overhead": "1 - seconds of decoding / seconds in all: preparing (the suite, warm-up), costs, analysis, writing",
}


def write_report(
    folder: Path,
    evaluation: Evaluation,
    target: Target,
    head: str | None,
    config: dict[str, Any],
    note: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Write all forms to `folder`, and the plots to `plots/` in it; returns what `report.json` holds.

    Args:
        folder: is made.
        evaluation: what was measured.
        target: that it was measured on.
        head: its folder, None for the free baselines alone.
        config: the settings.
        note: is told, in a sentence, what is not written and how to have it.
    """
    started = time.perf_counter()
    content = report(evaluation, target, head, config)
    write_json_atomic(folder / "rejections.json", [asdict(one) for one in evaluation.rejections.kept])
    drawn = figures(content)
    write_bytes_atomic(folder / "report.html", page(content, drawn, evaluation.rejections.kept).encode())
    write_plots(folder / "plots", drawn, note)
    # All but the last two files, which tell it.
    content["seconds"] = evaluation.seconds | {"writing": time.perf_counter() - started}
    content["overhead"] = overhead(content["seconds"])
    write_bytes_atomic(folder / "report.md", markdown(content).encode())
    write_json_atomic(folder / "report.json", content)
    return content


def report(evaluation: Evaluation, target: Target, head: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """The content of `report.json`."""
    template = target.tokenizer.chat_template
    return {
        "schema": SCHEMA,
        "sstf": version("sstf"),
        "target": target.spec.to_json(),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest(),
        "head": head,
        "eval": config,
        "engine": "sstf (transformers modules)",
        "hardware": hardware(),
        "formulas": FORMULAS,
        "rows": _objects(evaluation.rows),
        "by_mode": _objects(evaluation.by_mode),
        "by_length": _objects(evaluation.by_length),
        "limits": _objects(evaluation.limits),
        "distributions": _objects(evaluation.distributions),
        "rejections": evaluation.rejections.counts,
        "costs": {str(batch): cost.to_json() for batch, cost in evaluation.costs.items()},
        "seconds": evaluation.seconds,
        "overhead": overhead(evaluation.seconds),
        "training": training_curve(Path(head).parent / "metrics.jsonl") if head else None,
        "prompts": _objects(evaluation.prompts),
    }


def overhead(seconds: Mapping[str, float]) -> float | None:
    """Share of the wall clock that is not decoding; None where nothing was timed.

    >>> overhead({"decoding": 97.0, "analysis": 2.0, "writing": 1.0})
    0.03
    """
    whole = sum(seconds.values())
    return round(1 - seconds["decoding"] / whole, 6) if whole else None


def training_curve(log: Path) -> list[tuple[int, float]] | None:
    """Simulated accepted length by optimiser step, from the log beside a head; None where there is no such log. A line
    that a crash cut off is passed over."""
    if not log.is_file():
        return None
    points = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if "val/simulated_accepted_length" in figures:
            points.append((int(figures["step"]), float(figures["val/simulated_accepted_length"])))
    return points or None


def _objects(items: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]


def markdown(content: dict[str, Any]) -> str:
    """The readable form: overall rows, then by group, positions, limits and causes, then the formulas."""
    machine = content["hardware"]
    lines = [
        "# Evaluation",
        "",
        f"Target {content['target']['name']} ({content['target']['dtype']}), engine {content['engine']}, "
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.",
        "",
        *tables.overall(content).markdown(),
        "",
    ]
    for name, table in tables.groups(content):
        lines += [f"## By {name}", "", *table.markdown(), ""]
    lines += ["## Acceptance by draft position", "", *tables.positions(content).markdown(), ""]
    if content["limits"]:
        lines += ["## Limits", "", *tables.limits(content).markdown(), ""]
    if content["rejections"]:
        heading = "## Why drafts were rejected (temperature 0)"
        lines += [heading, "", *tables.causes(content["rejections"]).markdown(), ""]
    if content["overhead"] is not None:
        others = ", ".join(f"{name} {took:.1f} s" for name, took in content["seconds"].items() if name != "decoding")
        took = content["seconds"]["decoding"]
        lines += [f"Decoding took {took:.1f} s; beside it, {others}: an overhead of {content['overhead']:.1%}.", ""]
    lines += ["## Formulas", "", *[f"- `{name}`: {formula}" for name, formula in content["formulas"].items()], ""]
    return "\n".join(lines)
