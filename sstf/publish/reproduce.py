"""Runs the evaluation that a card tells once more, and says how far its figures drift.

The prompts, settings and seed are the card's; so are the bounds, its 95 % intervals over prompts. Greedy decoding of
the same prompts gives the same accepted length on the same machine, so there an interval is generous; elsewhere
rounding turns near ties, and the interval is the measure. A speedup belongs to its hardware: on other hardware it is
told, not judged. Policies that adapt to measured time (`cost_aware`) may differ a little even on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sstf.data.progress import Progress
from sstf.errors import DamagedDataError, DataError, HeadError
from sstf.evaluation import EvalConfig, evaluate
from sstf.evaluation.config import PLAIN
from sstf.evaluation.run import ALL
from sstf.evaluation.suites import NAMED
from sstf.formats import load_any, target_of
from sstf.machine import hardware
from sstf.publish.record import RunRecord, digest_of, prompts_of, read_record

ROUNDING = 1e-9  # an interval of one prompt is a point
# What makes two machines one for a speed. Not `threads` alone: cores that a process may use count as much.
SAME_HARDWARE = ("machine", "processor", "cores", "threads", "gpu", "gpus", "torch")


@dataclass(frozen=True)
class Drift:
    """One figure of one row of the card, and what it is now. `within` is None where it is not judged."""

    arm: str
    temperature: float
    figure: str
    card: float
    bounds: tuple[float, float]
    now: float
    within: bool | None

    @property
    def change(self) -> float:
        """Relative to the card's."""
        return self.now / self.card - 1


def reproduce(folder: Path, target_name: str | None, suite: Path | None, progress: Progress) -> list[Drift]:
    """Evaluate a head again as its card says.

    Args:
        folder: a published folder, or a head in its run.
        target_name: in place of the target that the head names.
        suite: the file of prompts, where the card's suite is not a built-in one.
        progress: of the evaluation.

    Returns:
        Accepted length and speedup of every row over all categories but the plain target's.

    Raises:
        HeadError: the head was never evaluated.
        DataError: the prompts are not those of the card.
        SstfError: the head or its target cannot be used.
    """
    record = read_record(folder)
    config, seed = protocol(record, folder, suite)
    target = target_of(folder, target_name)
    rows = evaluate(target, load_any(folder, target), config, progress, seed)
    assert record.evaluation is not None
    return drifts(record.evaluation, [asdict(row) for row in rows], hardware())


def protocol(record: RunRecord, folder: Path, suite: Path | None) -> tuple[EvalConfig, int]:
    """The settings and the seed of a recorded evaluation, with the same prompts.

    Raises:
        HeadError: none was recorded, or not all that a repetition needs.
        DataError: the prompts are not those of the card.
        DamagedDataError: the record is not one of ours.
    """
    report = record.evaluation
    if report is None:
        raise HeadError(f"{folder}: no evaluation is recorded for this head, so there is nothing to reproduce")
    if report.get("seed") is None or report.get("suite_sha256") is None:
        raise HeadError(f"{folder}: its evaluation records no {'seed' if report.get('seed') is None else 'prompts'}")
    fields: dict[str, Any] = dict(report["eval"])
    if suite is not None:
        fields["suite"] = str(suite)
    elif fields["suite"] not in NAMED and not Path(fields["suite"]).is_file():
        raise DataError(f"the card's suite is a file, {fields['suite']}; say where it is with --suite FILE")
    try:
        config = EvalConfig.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise DamagedDataError(
            f"{folder}: its evaluation has settings that this version does not know ({error.errors()[0]['msg']})"
        ) from None
    if digest_of(prompts_of(fields)) != report["suite_sha256"]:
        raise DataError(f"suite {config.suite}: its prompts are not those that the card was measured with")
    return config, int(report["seed"])


def drifts(card: dict[str, Any], rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[Drift]:
    """Compare the rows of a card's report with new ones of the same settings.

    Accepted length holds when it lies in the card's interval; a speedup, which is noisy on both sides, when the two
    intervals meet. A speedup is judged on the card's hardware only, and where neither side calls its row void.

    Raises:
        HeadError: the card has no row to compare with.
    """
    same = all(card["hardware"].get(key) == machine[key] for key in SAME_HARDWARE)
    made = {(row["arm"], row["temperature"]): row for row in rows if row["category"] == ALL}
    found = []
    for told in card["rows"]:
        if told["category"] != ALL or told["arm"] == PLAIN or not told["accepted_length"]:
            continue
        now = made[told["arm"], told["temperature"]]
        low, high = told["accepted_length_ci"]
        within = low - ROUNDING <= now["accepted_length"] <= high + ROUNDING
        found.append(_drift(told, "accepted_length", now["accepted_length"], within))
        low, high = told["speedup_ci"]
        judged = same and not told["void"] and not now["void"]
        meets = now["speedup_ci"][0] <= high and low <= now["speedup_ci"][1]
        found.append(_drift(told, "speedup", now["speedup"], meets if judged else None))
    if not found:
        raise HeadError("the card has no row with a draft, so there is nothing to compare with")
    return found


def _drift(told: dict[str, Any], figure: str, now: float, within: bool | None) -> Drift:
    low, high = told[f"{figure}_ci"]
    return Drift(told["arm"], told["temperature"], figure, told[figure], (low, high), now, within)
