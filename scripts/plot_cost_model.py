"""Draw the cost model from lines that `scripts/bench_decode.py` printed.

    python scripts/plot_cost_model.py docs/figures/bench_decode.jsonl docs/figures/cost-model.svg

Left: what a verify pass over n rows costs, in plain steps. Right: the speedup of drafts that are always right, as the
model predicts it and as measured; below that line lie the heads, whose drafts are not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.lines.read_text().splitlines() if line.startswith("{")]
    machine = next(line for line in lines if line["bench"] == "machine")
    sizes = [line for line in lines if line["bench"] == "size"]
    if not sizes:
        raise SystemExit(f"{args.lines} has no `size` lines; run scripts/bench_decode.py --only size")
    rows = [line["rows"] for line in sizes]
    plt.rcParams.update({"svg.hashsalt": "sstf", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    left.plot(rows, [line["t_verify_over_t_target"] for line in sizes], marker="o", ms=3, label="verify pass")
    left.plot(rows, [line["t_host_over_t_target"] for line in sizes], marker="o", ms=3, label="host work")
    level = sizes[0]["t_draft_over_t_target"]
    left.axhline(level, color="tab:green", lw=1, label=f"one draft level ({level:.3f})")
    left.set(xlabel="rows a pass (n)", ylabel="time / plain step", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(rows, [line["speedup_predicted"] for line in sizes], color="black", lw=1, label="cost model")
    right.plot(rows, [line["speedup_measured"] for line in sizes], "o", ms=4, label="measured")
    right.set(xlabel="rows a pass (n), drafts always right", ylabel="speedup", ylim=(0, None))
    right.legend(frameon=False)
    where = machine["gpu"] or machine["processor"]
    title = f"{machine['target']}, {machine['dtype']}, {where}, {machine['threads']} threads"
    figure.suptitle(title, fontsize=9)
    figure.savefig(args.figure, metadata={"Date": None, "Creator": "scripts/plot_cost_model.py"})


if __name__ == "__main__":
    main()
