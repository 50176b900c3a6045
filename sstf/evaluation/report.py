"""The evaluation report: `report.json` for machines, `report.md` for people."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.evaluation.config import PLAIN
from sstf.evaluation.run import ALL, Row, rows_to_json
from sstf.targets import Target

SCHEMA = 1
FORMULAS = {
    "accepted_length": "tokens emitted by verify passes / verify passes (bonus token included; 1 .. depth + 1)",
    "survival": "passes that accepted draft position i / passes",
    "acceptance_rate": "passes that accepted position i / passes that accepted position i - 1",
    "tokens_per_second": "tokens after the first / seconds after the prefill, batch 1",
    "speedup": "tokens_per_second / plain tokens_per_second, same engine, prompts and run; 95 % bootstrap over prompts",
    "draft_ms, verify_ms": "milliseconds a verify pass",
}


def hardware() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def write_report(folder: Path, rows: Sequence[Row], target: Target, head: str | None, config: dict[str, Any]) -> None:
    """Write both forms to `folder`."""
    content = {
        "schema": SCHEMA,
        "target": target.spec.to_json(),
        "head": head,
        "eval": config,
        "engine": "sstf (transformers modules)",
        "hardware": hardware(),
        "formulas": FORMULAS,
        "rows": rows_to_json(rows),
    }
    write_json_atomic(folder / "report.json", content)
    write_bytes_atomic(folder / "report.md", markdown(rows, content).encode())


def markdown(rows: Sequence[Row], content: dict[str, Any]) -> str:
    """The readable form: overall rows, then by category, then the formulas."""
    machine = content["hardware"]
    lines = [
        "# Evaluation",
        "",
        f"Target {content['target']['name']} ({content['target']['dtype']}), engine {content['engine']}, "
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.",
        "",
        *_table([row for row in rows if row.category == ALL], "arm"),
        "",
        "## By category",
        "",
        *_table([row for row in rows if row.category != ALL and row.arm != PLAIN], "category"),
        "",
        "## Acceptance by draft position",
        "",
        "| arm | temperature | survival | acceptance rate |",
        "|---|---|---|---|",
        *[
            f"| {r.arm} | {r.temperature:g} | {_list(r.survival)} | {_list(r.acceptance_rate)} |"
            for r in rows
            if r.category == ALL and r.survival
        ],
        "",
        "## Formulas",
        "",
        *[f"- `{name}`: {formula}" for name, formula in content["formulas"].items()],
        "",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row], first: str) -> list[str]:
    out = [
        f"| arm |{' category |' if first == 'category' else ''} temperature | accepted length | tokens/s | speedup "
        "| draft ms | verify ms | same text | note |",
        "|---|" + ("---|" if first == "category" else "") + "---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"| {r.arm} |" + (f" {_cell(r.category)} |" if first == "category" else "")
        same = "" if r.identical is None else f"{r.identical:.0%}"
        out.append(
            f"{name} {r.temperature:g} | {r.accepted_length:.2f} ({r.accepted_length_ci[0]:.2f} to "
            f"{r.accepted_length_ci[1]:.2f}) | {r.tokens_per_second:.1f} | {r.speedup:.2f} ({r.speedup_ci[0]:.2f} to "
            f"{r.speedup_ci[1]:.2f}) | {r.draft_ms:.1f} | {r.verify_ms:.1f} | {same} | {r.void or ''} |"
        )
    return out


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _list(values: Sequence[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.2f}" for value in values)
