"""The model card, written from what a run recorded. What was not recorded is said to be so, never filled in.

Figures stand with their protocol: the suite, the hardware and the interval. Layout and terms are those that readers of
speculative-decoding cards know: base model, use, results, training, licence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from sstf.decode import CostModel
from sstf.evaluation.config import NGRAM, PLAIN
from sstf.evaluation.figures import survival_plot, training_plot
from sstf.evaluation.run import ALL
from sstf.formats import Engine, sglang_algorithm, speculative_config
from sstf.methods import TrainableMethod, build_method
from sstf.methods.checkpoint import StoredHead
from sstf.publish.gate import Verdict
from sstf.publish.record import DEFAULT_MODE, RunRecord

UNKNOWN = "not recorded"
ACCEPTANCE, CURVE = "acceptance", "training"
BASELINES = (PLAIN, NGRAM)
PAPERS = {
    "dflash": ("DFlash", "https://arxiv.org/abs/2602.06036"),
    "domino": ("Domino", "https://arxiv.org/abs/2605.29707"),
    "dspark": ("DSpark", "https://arxiv.org/abs/2607.05147"),
    "eagle": ("EAGLE", "https://arxiv.org/abs/2401.15077"),
    "eagle3": ("EAGLE-3", "https://arxiv.org/abs/2503.01840"),
    "early_exit": ("early exit, as in Kangaroo", "https://arxiv.org/abs/2404.18911"),
    "medusa": ("Medusa", "https://arxiv.org/abs/2401.10774"),
    "p_eagle": ("P-EAGLE", "https://arxiv.org/abs/2602.01469"),
}
# Settings that a reader of a card asks for; all of them are in run.json.
SETTINGS = ("epochs", "steps", "step_tokens", "optimizer", "schedule", "precision", "warm_start")


@dataclass(frozen=True)
class BaseModel:
    """The target, as others can find it. `revision` is a commit, if known; `note` says how its weights differ there."""

    name: str
    revision: str | None = None
    licence: str | None = None
    note: str = ""


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells; `record` as it is for others."""

    repo: str
    base: BaseModel
    stored: StoredHead
    record: RunRecord
    engines: tuple[Engine, ...]
    left_out: dict[str, str]  # engine -> why the head has no form for it
    verdicts: list[Verdict]
    forced: bool
    shown: dict[str, str] = field(default_factory=dict)  # plot -> its file


def write_card(facts: CardFacts) -> str:
    """README.md: front matter for the hub, then the card."""
    sections = [
        _front_matter(facts),
        _introduction(facts),
        _use(facts),
        _results(facts),
        _depth(facts),
        _training(facts),
        _checks(facts),
        _licence(facts),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def plots(record: RunRecord) -> dict[str, str]:
    """The card's figures as SVG, by the name of their files; none where nothing was measured."""
    found = {
        ACCEPTANCE: survival_plot(_rows(record)),
        CURVE: training_plot(record.curve.points if record.curve else []),
    }
    return {name: svg for name, svg in found.items() if svg}


@dataclass(frozen=True)
class Depths:
    """Of the greedy chain that was measured: accepted length at depths 1, 2, ..., and by batch size the computed
    speedup at each of them."""

    accepted_length: list[float]
    speedup: dict[int, list[float]]

    def best(self, batch: int) -> tuple[int, float]:
        """The depth with the highest speedup, and that speedup."""
        speeds = self.speedup[batch]
        return 1 + speeds.index(max(speeds)), max(speeds)


def depths(record: RunRecord) -> Depths | None:
    """What each depth of the measured chain gives. None without a greedy chain that may be quoted.

    A pass that drafts k tokens emits 1 + survival[1] + ... + survival[k]. Its time is that of the report's measured
    costs for the batch size; a report without them has the chain's own times, of batch 1: the verify time, and k of the
    D parts of the drafting time at its depth D.

    >>> row = {"arm": "c", "temperature": 0.0, "category": "all", "void": None, "survival": [0.6, 0.1, 0.0],
    ...        "draft_ms": 30.0, "verify_ms": 100.0}
    >>> plain = row | {"arm": "plain", "survival": [], "draft_ms": 0.0}
    >>> config = {"policies": {"c": {"kind": "chain", "depth": 3, "lookup": False}}}
    >>> depths(RunRecord([], evaluation={"rows": [plain, row], "eval": config}))
    Depths(accepted_length=[1.6, 1.7, 1.7], speedup={1: [1.455, 1.417, 1.308]})
    """
    report = record.evaluation
    overall = [row for row in _rows(record) if row["category"] == ALL and row["temperature"] == 0 and not row["void"]]
    plain = next((row for row in overall if row["arm"] == PLAIN), None)
    if report is None or plain is None:
        return None
    for row in overall:
        policy = report["eval"]["policies"].get(row["arm"], {})
        if policy.get("kind") != "chain" or policy["lookup"]:
            continue
        depth = policy["depth"]
        lengths = [round(1 + sum(row["survival"][:k]), 3) for k in range(1, depth + 1)]
        costs = {int(batch): CostModel.from_json(cost) for batch, cost in report.get("costs", {}).items()}
        if costs:
            speedups = {
                batch: [round(cost.speedup(length, k, k), 3) for k, length in enumerate(lengths, 1)]
                for batch, cost in costs.items()
            }
        else:
            times = [row["verify_ms"] + row["draft_ms"] * k / depth for k in range(1, depth + 1)]
            speeds = [length * plain["verify_ms"] / time for length, time in zip(lengths, times, strict=True)]
            speedups = {1: [round(speed, 3) for speed in speeds]}
        return Depths(lengths, speedups)
    return None


# ---- sections --------------------------------------------------------------------------------------------------------


def _front_matter(facts: CardFacts) -> list[str]:
    kind = facts.stored.config.kind
    fields: dict[str, Any] = {
        "base_model": facts.base.name,
        "base_model_relation": "adapter",  # of the hub's four words: trained beside a base model that stays as it is
        "library_name": "sstf",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", kind, *facts.engines],
    }
    if "/" not in facts.base.name:  # no address on a hub, whose front matter wants one
        del fields["base_model"], fields["base_model_relation"]
    if facts.base.licence:
        fields["license"] = facts.base.licence
    return ["---", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def _introduction(facts: CardFacts) -> list[str]:
    stored, record, base = facts.stored, facts.record, facts.base
    target = stored.target
    name, paper = PAPERS.get(stored.config.kind, (stored.config.kind, ""))
    method = f"[{name}]({paper})" if paper else name
    weights = sum(tensor.numel() for tensor in stored.tensors.values() if tensor.is_floating_point())
    draft_vocab = len(stored.tensors["d2t"])
    trained = record.training or {}
    made_by = record.starts[-1]["sstf"] if record.starts else {}
    commit = f", commit `{made_by['commit']}`" if made_by.get("commit") else ""
    note = f"; {_cell(base.note)}" if base.note else ""
    altered = " with local changes" if made_by.get("modified") else ""
    lines = [
        f"# {facts.repo.rpartition('/')[2]}",
        "",
        f"A draft head ({method}) for speculative decoding with {_model(base.name)}: it drafts tokens that the base "
        "model verifies, so the base model's own answers come faster. It is of no use alone or with another model.",
        "",
        *(["**Published although a check failed; see Checks.**", ""] if facts.forced else []),
        "| | |",
        "|---|---|",
        f"| base model | {_model(base.name)} |",
        f"| its revision | {f'`{base.revision}`' if base.revision else UNKNOWN} |",
        f"| its weights as trained for | {target.dtype}, fingerprint `{target.fingerprint}`{note} |",
        f"| method | {method}, reads the outputs of layers {_list(stored.layers)} (0-based) |",
        f"| weights of the head | {weights:,} |",
        f"| draft vocabulary | {draft_vocab:,} of {target.vocab_size:,} tokens; coverage of held-out tokens "
        f"{_share(trained.get('draft_vocab_coverage'))}, probability of the target that it leaves out "
        f"{_share(trained.get('draft_vocab_lost_mass'))} |",
        f"| context | the base model's {target.max_position_embeddings:,} tokens; trained on at most "
        f"{_count(record.config.get('data', {}).get('max_length'))} |",
        f"| made with | sstf {made_by.get('version', UNKNOWN)}{commit}{altered} |",
    ]
    return lines


def _use(facts: CardFacts) -> list[str]:
    known = depths(facts.record)
    # Without a measurement, as deep as training taught.
    depth = known.best(min(known.speedup))[0] if known else _taught(facts.stored)
    kind = facts.stored.config.kind
    base, name = facts.base.name, facts.repo.rpartition("/")[2]
    fetch = f"hf download {facts.repo} --include '{{engine}}/*' --local-dir {name}"
    lines = ["## Use"]
    if "vllm" in facts.engines:
        config = json.dumps(speculative_config(kind, f"{name}/vllm", depth))
        lines += ["", "vLLM:", "", "```sh", fetch.format(engine="vllm")]
        lines += [f"vllm serve {base} --speculative-config '{config}'", "```"]
    if "sglang" in facts.engines:
        lines += ["", "SGLang:", "", "```sh", fetch.format(engine="sglang")]
        lines += [
            f"python -m sglang.launch_server --model-path {base} --speculative-algorithm {sglang_algorithm(kind)} \\",
            f"    --speculative-draft-model-path {name}/sglang --speculative-num-steps {depth} \\",
            f"    --speculative-eagle-topk 1 --speculative-num-draft-tokens {depth + 1}",
            "```",
        ]
    if "speculators" in facts.engines:
        lines += ["", "`speculators/` holds the head in the form of the speculators library, which vLLM also loads."]
    if "transformers" in facts.engines:
        lines += ["", "transformers:", "", "```python"]
        lines += [
            f'drafter = AutoModel.from_pretrained("{name}/transformers", dtype="auto")',
            'model.generate(**inputs, assistant_model=drafter, speculation_type="dflash")',
            "```",
        ]
    lines += ["", "sstf:", "", "```sh", f"sstf pull {facts.repo}", f"sstf chat {name}", "```"]
    lines += [line for engine, why in facts.left_out.items() for line in ("", f"No form for {engine}: {why}.")]
    return lines


def _taught(stored: StoredHead) -> int:
    method = build_method(stored.config)
    assert isinstance(method, TrainableMethod)
    return method.positions


def _results(facts: CardFacts) -> list[str]:
    report = facts.record.evaluation
    if report is None:
        return ["## Results", "", f"Evaluation: {UNKNOWN}."]
    protocol, machine, rows = report["eval"], report["hardware"], _rows(facts.record)
    where = machine["gpu"] or machine["processor"]
    prompts = next(row["prompts"] for row in rows if row["category"] == ALL)
    overall = [row for row in rows if row["category"] == ALL]
    top_p = "" if protocol["top_p"] == 1 else f", top-p {protocol['top_p']:g}"
    lines = [
        "## Results",
        "",
        f"Suite `{protocol['suite']}`, {prompts} prompts, at most {protocol['max_new_tokens']} new tokens, "
        f"{protocol['repeats']} {'run' if protocol['repeats'] == 1 else 'runs'} of each{top_p}, seed "
        f"{UNKNOWN if report.get('seed') is None else report['seed']}, batch 1; {_modes(report)}. "
        f"Engine: {report['engine']}, {report['target']['dtype']}, on {where} ({machine['threads']} threads, torch "
        f"{machine['torch']}). All rows were measured in one run, every prompt through all of them in turn. Intervals "
        "are 95 %, from a bootstrap over prompts. Figures of a serving engine are not among them.",
        "",
        "| how | temperature | accepted length | tokens/s | speedup | same text as plain | note |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {_cell(row['arm'])}{_policy(protocol, row['arm'])} | {row['temperature']:g} | "
            f"{_interval(row, 'accepted_length')} | {row['tokens_per_second']:.1f} | {_interval(row, 'speedup')} | "
            f"{'' if row['identical'] is None else format(row['identical'], '.0%')} | {_void(row)} |"
            for row in overall
        ],
        "",
        *[f"- `{name}`: {formula}" for name, formula in report["formulas"].items() if not name.startswith("draft_ms")],
    ]
    if ACCEPTANCE in facts.shown:
        lines += ["", f"![Passes that accept a draft position]({facts.shown[ACCEPTANCE]})"]
    for group, found in (
        ("category", rows),
        ("mode", report.get("by_mode")),
        ("prompt length", report.get("by_length")),
    ):
        lines += _by_group(group, found or [])
    return [
        *lines,
        "",
        f"`sstf reproduce {facts.repo.rpartition('/')[2]}` measures these figures again and says how far they drift.",
    ]


def _by_group(group: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the rows of each category, mode or length that have a head."""
    parts = [row for row in rows if row["category"] != ALL and row["arm"] not in BASELINES]
    if not parts:
        return []
    return [
        "",
        f"### By {group}",
        "",
        f"| how | {group} | temperature | prompts | accepted length | speedup | note |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {_cell(row['arm'])} | {_cell(row['category'])} | {row['temperature']:g} | {row['prompts']} | "
            f"{_interval(row, 'accepted_length')} | {_interval(row, 'speedup')} | {_void(row)} |"
            for row in parts
        ],
    ]


def _depth(facts: CardFacts) -> list[str]:
    lines = ["## Recommended depth", ""]
    found = depths(facts.record)
    if found is None:
        return [*lines, "Not measured, at no batch size."]
    batches = sorted(found.speedup)
    lines += [
        "| depth | accepted length |" + "".join(f" speedup, batch {batch} |" for batch in batches),
        "|---|---|" + "---|" * len(batches),
        *[
            f"| {k} | {length:.2f} |" + "".join(f" {found.speedup[batch][k - 1]:.2f} |" for batch in batches)
            for k, length in enumerate(found.accepted_length, 1)
        ],
        "",
    ]
    for batch in batches:
        depth, speedup = found.best(batch)
        lines.append(f"- batch {batch}: " + (f"{depth}" if speedup > 1 else "do not draft, no depth is faster"))
    return [
        *lines,
        "",
        "Of a greedy chain; computed from its measured acceptance and the times of passes on the hardware above. Other "
        "batch sizes were not measured.",
    ]


def _training(facts: CardFacts) -> list[str]:
    record = facts.record
    config, trained = record.config, record.training or {}
    data, settings = config.get("data", {}), config.get("train", {})
    source = data.get("source", {})
    report, kind = record.data or {}, source.get("kind", "")
    lines = ["## Training", "", "| | |", "|---|---|"]
    named = " ".join(str(source[key]) for key in ("name", "subset", "split", "revision", "path") if source.get(key))
    lines.append(f"| data | {_cell(f'{kind} {named}'.strip() or UNKNOWN)} |")
    lines.append(
        f"| its size | {_count(report.get('kept'))} conversations, {_count(report.get('tokens'))} tokens, of which "
        f"{_count(report.get('trained_tokens'))} are answers that were trained |"
    )
    lines.append(f"| answers | {_cell(_answers(data.get('answers')))} |")
    share = (record.features or {}).get("argmax_share")
    lines.append(f"| trained tokens that are the base model's first choice | {_share(share)} |")
    lines.append(f"| dropped | {_cell(_dropped(report))} |")
    lines.append(f"| decontamination | {_cell(_decontamination(record))} |")
    method = {key: value for key, value in facts.stored.config.model_dump(mode="json").items() if key != "kind"}
    lines.append(f"| method's settings | {_settings(method)} |")
    chosen = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    lines.append(f"| training's settings | {_settings(chosen) if chosen else UNKNOWN} |")
    if rounds := trained.get("rounds"):
        further = _settings(config.get("on_policy") or {})
        before, after = trained["accepted_length_before"], trained["accepted_length"]
        won = "" if after is None else f"; accepted length on held-out text {before:.3f} -> {after:.3f}"
        lines.append(
            f"| then on its own rollouts (the rows below are of the last of {len(rounds)} rounds) | {further}{won} |"
        )
    lines.append(
        f"| steps | {_count(trained.get('steps'))}, {_count(trained.get('trained_tokens'))} tokens; the head is that "
        f"of step {_count(trained.get('best_step'))}, chosen by {trained.get('chosen_by') or UNKNOWN} |"
    )
    lines.append(f"| hardware | {_cell(_hardware(record))} |")
    lines.append(f"| hours | {_hours(trained)}; the data's answers and the features: {UNKNOWN} |")
    if CURVE in facts.shown:
        lines += ["", f"![Simulated accepted length while training]({facts.shown[CURVE]})"]
    return [*lines, "", "`run.json` holds the whole configuration, the versions and every start."]


def _checks(facts: CardFacts) -> list[str]:
    lines = ["## Checks", ""]
    return [
        *lines,
        "Run on these files before they were published.",
        "",
        "| check | verdict | found |",
        "|---|---|---|",
        *[f"| {_cell(v.name)} | {'pass' if v.passed else '**fail**'} | {_cell(v.detail)} |" for v in facts.verdicts],
    ]


def _licence(facts: CardFacts) -> list[str]:
    return [
        "## Licence",
        "",
        f"Of this head: {facts.base.licence or 'not stated'}. The base model, which it was trained on, has its own.",
    ]


# ---- words -----------------------------------------------------------------------------------------------------------


def _rows(record: RunRecord) -> list[dict[str, Any]]:
    return list(record.evaluation["rows"]) if record.evaluation else []


def _answers(answers: dict[str, Any] | None) -> str:
    if not answers:
        return UNKNOWN
    if answers["kind"] == "keep":
        return "those of the data, not written again"
    engine = answers["engine"]["kind"].replace("_", " ")
    temperatures = ", ".join(f"{value:g}" for value in answers["temperatures"])
    return (
        f"written again by the base model ({engine}; temperatures {temperatures}; top-p {answers['top_p']:g}, top-k "
        f"{answers['top_k']}; at most {answers['max_new_tokens']} tokens; seed {answers['seed']})"
    )


def _dropped(report: dict[str, Any]) -> str:
    if not report:
        return UNKNOWN
    return ", ".join(f"{count:,} where {reason}" for reason, count in report["dropped"].items()) or "none"


def _decontamination(record: RunRecord) -> str:
    if record.data is None:
        return UNKNOWN
    suites, found = record.data["suites"], record.data["contamination"]
    if not suites:
        text = "the data was compared with no suite"
    else:
        hits = ", ".join(f"{count:,} of {suite}" for suite, count in found["matched"].items()) or "none"
        text = f"{found['checked']:,} conversations compared with the prompts of {', '.join(suites)}; taken out: {hits}"
    seen = record.seen_in_training
    if seen is None:
        return text
    return f"{text}; {seen:,} training conversations hold a prompt of the evaluation above"


def _hardware(record: RunRecord) -> str:
    if not record.starts:
        return UNKNOWN
    start = record.starts[-1]
    machine, launch = start["hardware"], start["launch"]
    device = (
        f"{machine['gpus']} × {machine['gpu']}"
        if machine["gpu"]
        else f"{machine['processor']}, {machine['cores']} cores"
    )
    many = "" if launch["processes"] == 1 else f", {launch['processes']} processes on {launch['machines']} machines"
    return device + many


def _hours(trained: dict[str, Any]) -> str:
    tokens, pace = trained.get("trained_tokens"), trained.get("tokens_per_second")
    if not tokens or not pace:
        return f"training: {UNKNOWN}"
    return f"training: {tokens / pace / 3600:.2f} ({tokens:,} tokens at {pace:,.0f} a second)"


def _modes(report: dict[str, Any]) -> str:
    modes = report.get("modes")
    if not modes:
        return f"mode: {UNKNOWN}"
    if list(modes) == [DEFAULT_MODE]:
        return "thinking is left to the chat template, and was not measured on and off apart"
    return "prompts by mode: " + ", ".join(f"{count} {mode}" for mode, count in modes.items())


def _policy(protocol: dict[str, Any], arm: str) -> str:
    policy = protocol["policies"].get(arm)
    if policy is None:
        return ""
    nodes = f", at most {policy['total_tokens']} nodes" if policy.get("total_tokens") else ""
    return f" (depth {policy['depth']}{nodes}{', with lookup' if policy.get('lookup') else ''})"


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def _void(row: dict[str, Any]) -> str:
    return f"void: {_cell(row['void'])}" if row["void"] else ""


def _settings(fields: dict[str, Any]) -> str:
    return "`" + _cell(json.dumps(fields, ensure_ascii=False).replace("`", "'")) + "`"


def _model(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _cell(text: str) -> str:
    """A text for one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _count(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _share(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"
