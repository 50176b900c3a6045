"""Two evaluations of the same prompts, compared prompt by prompt.

Prompts differ far more than heads do, so two intervals that overlap say little: the differences on the same prompts
decide. A difference is the new report's figure minus the old one's, its interval a bootstrap over prompts, and the
sign test asks how often as many prompts would gain by chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sstf.errors import DamagedDataError, DataError
from sstf.evaluation.config import PLAIN
from sstf.evaluation.metrics import intervals, sign_test

FIGURES = ("accepted_length", "speedup")
SAME = ("max_new_tokens", "top_p")  # settings that make texts, and so prompts' figures, comparable


@dataclass(frozen=True)
class Paired:
    """One figure of one arm at one temperature: means over prompts, and what differs."""

    arm: str
    temperature: float
    figure: str
    prompts: int
    old: float
    new: float
    difference: float
    difference_ci: tuple[float, float]
    better: int
    worse: int
    p_value: float

    @property
    def verdict(self) -> str:
        """What the interval and the sign test say together, at 5 %."""
        low, high = self.difference_ci
        if (low > 0 or high < 0) and self.p_value < 0.05:
            return "better" if low > 0 else "worse"
        return "no clear difference"


def read_report(path: Path) -> dict[str, Any]:
    """A `report.json`, given itself or its folder.

    Raises:
        DataError: there is none, or it has no figures by prompt.
        DamagedDataError: it cannot be read.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"report {file} cannot be read ({error.strerror}); name a report.json or its folder") from None
    except ValueError:
        raise DamagedDataError(f"{file}: not valid JSON; evaluate again") from None
    if not isinstance(content, dict) or "rows" not in content:
        raise DataError(f"{file}: not a report of `sstf eval`; name a report.json or its folder")
    if "prompts" not in content:
        raise DataError(f"{file}: a report of an older version, without figures by prompt; evaluate that head again")
    return content


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Paired]:
    """Every arm that both reports measured, at every temperature that both have.

    Raises:
        DataError: the reports are not of the same target, prompts and limits, or have no arm in common.
    """
    if old["target"]["fingerprint"] != new["target"]["fingerprint"]:
        raise DataError(
            f"the reports are of different targets ({old['target']['name']} and {new['target']['name']}); differences "
            "of heads can be seen on the same target only"
        )
    for key in SAME:
        if old["eval"].get(key) != new["eval"].get(key):
            raise DataError(
                f"the reports were made with eval.{key}={old['eval'].get(key)} and {new['eval'].get(key)}; evaluate "
                "with the same"
            )
    before, after = _by_arm(old), _by_arm(new)
    if _asked(old) != _asked(new):
        raise DataError("the reports are of different prompts; evaluate with the same suite, prompts and categories")
    common = [key for key in after if key in before and key[0] != PLAIN]
    if not common:
        names = ", ".join(sorted({arm for arm, _ in before}))
        raise DataError(f"no arm and temperature is in both reports; the old one has {names}")
    return [pair for key in common for pair in _pairs(key, before, after)]


def _pairs(key: tuple[str, float], before: _Arms, after: _Arms) -> Iterator[Paired]:
    arm, temperature = key
    for figure in FIGURES:
        pairs = []
        for prompt in after[key]:
            found = [_figure(figure, arms[key][prompt], arms[PLAIN, temperature][prompt]) for arms in (before, after)]
            if None not in found:
                pairs.append(found)
        if not pairs:
            continue
        values = np.array(pairs, dtype=np.float64)
        differences = values[:, 1] - values[:, 0]
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        sums = np.stack([differences, np.ones_like(differences)], 1)
        yield Paired(
            arm,
            temperature,
            figure,
            len(pairs),
            float(values[:, 0].mean()),
            float(values[:, 1].mean()),
            float(differences.mean()),
            intervals(sums, lambda total: total[:, 0] / total[:, 1]),
            better,
            worse,
            sign_test(better, worse),
        )


_Arms = dict[tuple[str, float], dict[str, dict[str, Any]]]


def _by_arm(report: dict[str, Any]) -> _Arms:
    found: _Arms = {}
    for figures in report["prompts"]:
        found.setdefault((figures["arm"], figures["temperature"]), {})[figures["prompt"]] = figures
    return found


def _asked(report: dict[str, Any]) -> dict[str, int]:
    """The prompts by their ids, with their lengths, which tell most other texts of the same id apart."""
    return {figures["prompt"]: figures["prompt_tokens"] for figures in report["prompts"]}


def _figure(name: str, own: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """None where the text ended with its first token."""
    if not own["passes"] or not plain["passes"]:
        return None
    if name == "accepted_length":
        return float(own["tokens"] / own["passes"])
    return float((own["tokens"] / own["decode_s"]) / (plain["tokens"] / plain["decode_s"]))


def markdown(pairs: list[Paired], old: dict[str, Any], new: dict[str, Any]) -> str:
    """The comparison as a table, with what it does not say."""
    lines = [
        f"# {new['head']} against {old['head']}",
        "",
        "Means over prompts of each prompt's own figure; a difference is new minus old, with a 95 % bootstrap interval "
        "over prompts; the sign test is two-sided, without ties.",
        "",
        "| arm | temperature | figure | old | new | difference | better / worse | sign test | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {p.arm} | {p.temperature:g} | {p.figure.replace('_', ' ')} | {p.old:.3f} | {p.new:.3f} | "
            f"{p.difference:+.3f} ({p.difference_ci[0]:+.3f} to {p.difference_ci[1]:+.3f}) | "
            f"{p.better} / {p.worse} of {p.prompts} | p = {p.p_value:.3f} | {p.verdict} |"
            for p in pairs
        ),
    ]
    if old["hardware"] != new["hardware"]:
        lines += ["", "The reports are from different machines or versions: only accepted lengths can be compared."]
    return "\n".join([*lines, ""])
