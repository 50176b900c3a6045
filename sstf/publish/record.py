"""What is known of how a head was made and what it reached, from the folders of its run.

A head lies in `<run>/train/<key>/head`. Beside it lies what training recorded; the data, the features and the
evaluations of the same run are found by what they recorded themselves. A published folder carries all of it in
`run.json` and `evaluation.json`, and is read back from there. What was not recorded is None: a card says so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sstf.errors import DamagedDataError, DataError
from sstf.evaluation import load_suite
from sstf.evaluation.report import training_curve
from sstf.evaluation.suites import Prompt
from sstf.publish.scrub import scrubbed_for_others

RUN, EVALUATION = "run.json", "evaluation.json"
FORMAT = 1
DEFAULT_MODE = "default"  # of prompts that leave thinking to the chat template


@dataclass(frozen=True)
class Curve:
    """One figure of the validation by optimiser step."""

    steps: list[int]
    accepted_length: list[float]

    @property
    def points(self) -> list[tuple[int, float]]:
        """Step and figure, one pair a validation."""
        return list(zip(self.steps, self.accepted_length, strict=True))


@dataclass(frozen=True)
class RunRecord:
    """The stages of a run, each as it reported itself."""

    starts: list[dict[str, Any]]  # see `train.provenance`; the last one trained the head that is there
    training: dict[str, Any] | None = None  # the summary of the training stage
    curve: Curve | None = None
    data: dict[str, Any] | None = None  # see `data.build.DataReport`
    features: dict[str, Any] | None = None  # the summary of the extraction stage
    evaluation: dict[str, Any] | None = None  # see `evaluation.report`; with seed, digest and modes of the prompts
    seen_in_training: int | None = None  # conversations that hold a prompt of the evaluation

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the head was trained with; empty where it is not known."""
        config: dict[str, Any] = self.starts[-1]["config"] if self.starts else {}
        return config

    def for_others(self) -> RunRecord:
        """Without keys and local paths."""
        told = {name: scrubbed_for_others(value) for name, value in vars(self).items() if name != "curve"}
        return RunRecord(**told, curve=self.curve)

    def to_json(self) -> dict[str, Any]:
        """All but the evaluation, which has a file of its own."""
        fields = asdict(self)
        del fields["evaluation"]
        return {"format": FORMAT, **fields}


def read_record(head: Path, evaluation: Path | None = None) -> RunRecord:
    """What is known of the head in the folder `head`.

    Args:
        head: a head in its run, or a published folder.
        evaluation: the folder of the evaluation to tell; by default the latest one of this head.

    Raises:
        DamagedDataError: something that was recorded cannot be read.
    """
    if (head / EVALUATION).is_file() or (head / RUN).is_file():
        return _published(head)
    stage, run = head.parent, head.parents[2] if len(head.parents) > 2 else head
    starts = (_json(stage / "run.json") or {"starts": []})["starts"]
    config = starts[-1]["config"] if starts else {}
    evaluation = evaluation or _latest_evaluation(run, head)
    return RunRecord(
        starts=starts,
        training=_json(stage / "done.json"),
        curve=_curve(stage / "metrics.jsonl"),
        data=_json(_same_stage(run / "data", config, ("target", "data")), "report.json"),
        features=_json(_same_stage(run / "extract", config, ("target", "data", "extract")), "done.json"),
        evaluation=_evaluation(evaluation),
        seen_in_training=(_json(evaluation, "done.json") or {}).get("conversations_with_its_prompts"),
    )


def prompts_of(settings: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of an evaluation with these settings; those of older reports name no categories.

    Raises:
        DataError: the suite cannot be read.
    """
    return load_suite(settings["suite"], settings["prompts"], settings.get("categories", ()))


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Names prompts by their content."""
    # Without a mode that was not given: cards were written before prompts had any.
    fields = [{k: v for k, v in asdict(prompt).items() if v is not None} for prompt in prompts]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _published(folder: Path) -> RunRecord:
    fields = _json(folder / RUN) or {"starts": []}
    fields.pop("format", None)
    curve = fields.pop("curve", None)
    try:
        return RunRecord(**fields, curve=Curve(**curve) if curve else None, evaluation=_json(folder / EVALUATION))
    except TypeError:
        raise DamagedDataError(f"{folder / RUN}: not what `sstf publish` wrote; fetch the head again") from None


def _json(path: Path | None, name: str = "") -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    if path is None or not (path / name).is_file():
        return None
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except ValueError:
        raise DamagedDataError(f"{path / name}: not valid JSON; run its stage again or copy it again") from None
    if not isinstance(content, dict):
        raise DamagedDataError(f"{path / name}: expected a JSON object; run its stage again or copy it again")
    return content


def _same_stage(folder: Path, config: dict[str, Any], sections: tuple[str, ...]) -> Path | None:
    """The finished results that were made with the same `sections` of the configuration as the head.

    Not by the stage's key, which also holds the content of source files that may have moved since.
    """
    for candidate in sorted(folder.glob("*/done.json")):
        try:
            made_with = yaml.safe_load((candidate.parent / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if config and all(made_with.get(name) == config.get(name) for name in sections):
            return candidate.parent
    return None


def _latest_evaluation(run: Path, head: Path) -> Path | None:
    own = []
    for done in run.glob("eval/*/done.json"):
        measured = (_json(done.parent, "report.json") or {}).get("head") or ""
        if Path(measured).parts[-2:] == head.absolute().parts[-2:]:  # the training's key, and `head`
            own.append(done)
    return max(own, key=lambda done: done.stat().st_mtime).parent if own else None


def _evaluation(folder: Path | None) -> dict[str, Any] | None:
    """The report, with what a repetition needs: the seed, and which prompts these were."""
    report = _json(folder, "report.json")
    if report is None or folder is None:
        return None
    try:
        seed = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["seed"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        seed = None
    try:
        prompts = prompts_of(report["eval"])
    except DataError:  # the suite is not where it was
        return report | {"seed": seed, "suite_sha256": None, "modes": None}
    modes = dict(Counter(prompt.mode or DEFAULT_MODE for prompt in prompts))
    return report | {"seed": seed, "suite_sha256": digest_of(prompts), "modes": modes}


def _curve(log: Path) -> Curve | None:
    points = training_curve(log)
    return Curve([step for step, _ in points], [length for _, length in points]) if points else None
