"""From which version an engine runs what a head has, by the facts in `compatibility.json`; each names its source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sstf.errors import ExportError
from sstf.formats.layer_ids import Engine, usual_layers
from sstf.methods import Eagle3Config
from sstf.targets import TargetSpec

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "speculators": "speculators", "transformers": "transformers"}
FORMS: dict[Engine, str] = {
    "vllm": "eagle",
    "sglang": "eagle",
    "speculators": "speculators",
    "transformers": "transformers",
}
WHOSE = {
    "eagle": "EAGLE's",
    "speculators": "speculators'",
    "medusa": "Medusa's",
    "dflash": "DFlash's",
    "transformers": "transformers'",
}
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class Fact:
    """One row: `engine` reads `form` with `feature` from version `since` on; None is in no version looked at."""

    engine: str
    form: str
    feature: str
    since: str | None
    tested: list[str]
    source: str


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return data


def facts() -> list[Fact]:
    """All rows."""
    return [Fact(**row) for row in _data()["rows"]]


def features_of(config: Eagle3Config, target: TargetSpec, full_vocabulary: bool) -> list[str]:
    """What an engine has to be able to do to run an EAGLE-3 head, in the words of the table."""
    layers = config.layers or usual_layers(target.num_layers)
    has = {
        "eagle3": True,
        "several_layers": config.num_layers > 1,
        "full_vocabulary": full_vocabulary,
        "other_layers": tuple(layers) != usual_layers(target.num_layers),
        "other_layer_count": len(layers) != 3,
        "layers_of_deepseek": target.architecture.startswith(("Deepseek", "Kimi")) and min(layers) != 1,
        **{flag: getattr(config, flag) for flag in FLAGS},
    }
    return [name for name, there in has.items() if there]


def needs(engine: Engine, wanted: Sequence[str], form: str | None = None) -> list[str]:
    """What users of an export have to know: versions, and what nobody tried here.

    Args:
        engine: that the export is for. speculators' form is also served by vLLM.
        wanted: what the engine has to be able to do, in the words of the table; the method itself first.
        form: of the export, if not the usual one for EAGLE heads.

    Raises:
        ExportError: no version of the engine runs such a head.
    """
    rows = [fact for fact in facts() if fact.form == (form or FORMS[engine]) and fact.feature in wanted]
    sentences = []
    for one in dict.fromkeys([engine, *(fact.engine for fact in rows if fact.form == "speculators")]):
        own = [fact for fact in rows if fact.engine == one]
        never = [fact for fact in own if fact.since is None]
        if never and one == engine:
            raise ExportError(
                f"no version of {NAMES[one]} up to {_data()['looked_at'][one]} runs a head with "
                f"{_data()['features'][never[0].feature]} ({never[0].source})"
            )
        sentences.append(_sentence(one, own, never, wanted[0]))
    return sentences


def _sentence(engine: str, own: list[Fact], never: list[Fact], method: str) -> str:
    if never:
        return f"{NAMES[engine]} does not run it in this form: {never[0].feature}"
    newest = max(own, key=lambda fact: _key(fact.since))
    reason = "" if newest.feature == method else f", for {newest.feature}"
    tried = sorted({version for fact in own for version in fact.tested}, key=_key)
    untested = [fact.feature for fact in own if not fact.tested]
    said = f"tried here with {', '.join(tried)}" if tried else "untested here"
    if tried and untested:
        said += f", but for {', '.join(untested)}"
    return f"needs {NAMES[engine]} {newest.since} or later{reason}; {said}"


def _key(version: str | None) -> list[int]:
    return [int(part) for part in (version or "0").split(".") if part.isdigit()]


def table() -> str:
    """The facts as Markdown, for docs/engines.md."""
    lines = ["| engine | form | a head with | since | tried here | source |", "|---|---|---|---|---|---|"]
    for fact in facts():
        cells = (
            NAMES[fact.engine],
            WHOSE[fact.form],
            _data()["features"][fact.feature],
            fact.since or f"not up to {_data()['looked_at'][fact.engine]}",
            ", ".join(fact.tested) or "no",
            fact.source,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
