"""A configuration to start from: the settings of a run that people change, with values that suit a target and a method.

Nothing is said here about single methods or settings. A method's description is the first sentence of its module; what
a setting means is the sentence in which its section's docstring names it, or else which values the section takes. Of
the target its configuration and tokenizer are read, not its weights.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from transformers import AutoConfig

from sstf.config import RunConfig
from sstf.config_loading import Section, inline
from sstf.data.config import DataConfig, JsonlSource, KeepAnswers, RegenerateAnswers, SampleSource
from sstf.errors import ConfigError, TargetError
from sstf.evaluation import EvalConfig
from sstf.features import ExtractConfig
from sstf.formats import ExportConfig, engines_of
from sstf.methods import METHODS, DraftMethod, TrainableMethod, build_method
from sstf.targets import EMBEDDED, TargetConfig, locate
from sstf.targets.outline import TargetOutline, outline
from sstf.train.config import TrainConfig
from sstf.trees import Chain

WIDTH = 120
# Of the draft vocabulary, for targets below a billion parameters and from there on: what a smaller one saves in reading
# lm_head is a larger share of a small target's pass.
VOCABULARIES = (8192, 32_000)


@dataclass(frozen=True)
class Starter:
    """A method's settings for a target, and the method that they make."""

    target: TargetOutline
    config: Any
    method: DraftMethod


def description(kind: str) -> str:
    """A method in one sentence."""
    return _sentences(sys.modules[METHODS[kind][1].__module__].__doc__)[0]


def read_target(name: str) -> TargetOutline:
    """The target without its weights.

    Raises:
        TargetError: it cannot be read, or is no text model.
    """
    try:
        return outline(TargetConfig(name=name))
    except TargetError:
        if _more_than_text(name):
            raise TargetError(
                f"target {name} reads images or sound and cannot be loaded for text alone; expected a text model"
            ) from None
        raise


def _more_than_text(name: str) -> bool:
    try:
        fields = AutoConfig.from_pretrained(str(Path(locate(name)).expanduser())).to_dict()
    except (OSError, ValueError, KeyError):
        return False
    return not {"vision_config", "audio_config"}.isdisjoint(fields)


def suit(kind: str, target: TargetOutline) -> Starter:
    """Settings with which a method drafts for a target.

    Raises:
        ConfigError: there is no such method, or it cannot draft for this target; one sentence says why.
        TargetError: as `ConfigError`.
    """
    if kind not in METHODS:
        raise ConfigError(f"there is no method {kind!r}; expected one of {', '.join(METHODS)}")
    section = METHODS[kind][0]
    config = section()
    method = build_method(config)
    if method.shared_layers and target.recurrent:
        raise ConfigError(
            f"method {kind} drafts with the first layers of target {target.spec.name}, some of which keep a recurrent "
            "state that takes no tokens back; choose another method"
        )
    layers = method.feature_spec(target.spec).layers
    changes: dict[str, Any] = {}
    if "layers" in section.reads and config.layers is None:
        changes["layers"] = layers
    if "draft_vocab_size" in section.model_fields:
        changes["draft_vocab_size"] = min(VOCABULARIES[target.parameters >= 1e9], target.spec.vocab_size)
    config = config.model_copy(update=changes)
    method = build_method(config)
    if isinstance(method, TrainableMethod):  # what else it may refuse
        with torch.device("meta"):
            tokens = torch.arange(min(method.draft_vocab_size, target.spec.vocab_size))
            method.build_head(target.spec, target.frozen, tokens)
    return Starter(target, config, method)


def write_config(name: str, starter: Starter) -> str:
    """The YAML text; `name` is the target's, as `TargetConfig` takes it."""
    target, kind = starter.target, starter.config.kind
    trains = isinstance(starter.method, TrainableMethod)
    local = name not in EMBEDDED and Path(name).expanduser().is_dir()
    run_name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{target.spec.name}-{kind}").lstrip("-._")
    spec = target.spec
    lines = [
        *_comment(description(kind)),
        *_comment(
            f"For {spec.num_layers} layers, hidden size {spec.hidden_size:,}, vocabulary {spec.vocab_size:,}, context "
            f"{spec.max_position_embeddings:,}. `sstf plan FILE` says what the run needs, `sstf run FILE` does it."
        ),
        *_settings(RunConfig, {"name": run_name, "seed": 0}, indent=""),
    ]

    def add(key: str, section: type[Section], values: dict[str, Any], **comments: str) -> None:
        lines.extend(["", f"{key}:", *_settings(section, values, comments)])

    path = str(Path(name).expanduser().resolve()) if local else name
    default_target = TargetConfig(name=path)
    add("target", TargetConfig, {"name": path, "dtype": default_target.dtype, "device": default_target.device})
    if trains:
        own = name in EMBEDDED
        fresh = RegenerateAnswers()
        fresh = fresh.model_copy(
            update={"max_new_tokens": min(fresh.max_new_tokens, spec.max_position_embeddings // 4)}
        )
        data = DataConfig(source=SampleSource(), answers=KeepAnswers() if own else fresh)
        mine = inline(_chosen(JsonlSource(path=Path("conversations.jsonl"))))
        add(
            "data",
            DataConfig,
            {
                "source": _chosen(data.source),
                "answers": _chosen(data.answers),
                "max_conversations": None,
                "max_length": min(data.max_length, spec.max_position_embeddings),
            },
            source=f"{_sentences(SampleSource.__doc__)[0]} In its place: {mine}",
            answers=f"{_sentences(KeepAnswers.__doc__)[0]} Where the target did not write them: "
            f"{inline(_chosen(RegenerateAnswers()))}"
            if own
            else _sentences(RegenerateAnswers.__doc__)[0],
        )
        add("extract", ExtractConfig, _defaults(ExtractConfig(), ("codec", "teacher", "online")))
    add("method", type(starter.config), _of_method(starter.config))
    if trains:
        train = TrainConfig(epochs=3)
        values = _defaults(train, ("epochs", "step_tokens", "optimizer", "precision", "validation_conversations"))
        values["optimizer"] = {"kind": train.optimizer.kind, "learning_rate": train.optimizer.learning_rate}
        add("train", TrainConfig, values)
    add("eval", EvalConfig, _evaluation(starter))
    if engines := engines_of(kind):
        add("export", ExportConfig, {"engines": list(engines)})
    return "\n".join(lines) + "\n"


def _of_method(config: Section) -> dict[str, Any]:
    """What can be said about, without what is only there for heads that others published."""
    values = _defaults(config, ["kind", *type(config).model_fields])  # a section that extends another has it last
    return {
        key: value
        for key, value in values.items()
        if _named(type(config), key) or not (value is None or isinstance(value, bool))
    }


def _evaluation(starter: Starter) -> dict[str, Any]:
    context = starter.target.spec.max_position_embeddings
    config = EvalConfig().fitted(starter.method.limits, f"method {starter.config.kind}")
    values = _defaults(config, ("suite", "prompts", "max_new_tokens", "temperatures", "repeats"))
    values["max_new_tokens"] = min(config.max_new_tokens, context // 4)
    values["policies"] = {
        name: _chosen(policy)
        for name, policy in config.policies.items()
        if isinstance(policy, Chain) or not starter.target.recurrent
    }
    return values


# ---- text ------------------------------------------------------------------------------------------------------------


def _defaults(section: Section, keys: Iterable[str]) -> dict[str, Any]:
    """As plain data."""
    data = section.model_dump(mode="json")
    return {key: data.get(key) for key in keys}


def _chosen(section: Section) -> dict[str, Any]:
    """A kind and what of it differs from the defaults, or has none."""
    shown = section.model_dump(mode="json", exclude_defaults=True)
    kind = section.model_dump(mode="json", include={"kind"})
    return kind | shown


def _settings(
    section: type[Section], values: dict[str, Any], comments: dict[str, str] | None = None, indent: str = "  "
) -> list[str]:
    """Lines of a section, each setting with what it means."""
    lines: list[str] = []
    said: set[str] = set()
    for key, value in values.items():
        comment = (comments or {}).get(key) or _named(section, key) or _allowed(section, key)
        if comment in said:  # one sentence about several
            comment = ""
        said.add(comment)
        if isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values()) and value:
            lines += [*_comment(comment, indent), f"{indent}{key}:"]
            lines += [f"{indent}  {inline(name)}: {inline(inner)}" for name, inner in value.items()]
            continue
        line = f"{indent}{key}: {inline(value)}"
        if len(line) + len(comment) + 4 <= WIDTH:
            lines.append(f"{line}  # {comment}" if comment else line)
        else:
            lines += [*_comment(comment, indent), line]
    return lines


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def _sentences(text: str | None) -> list[str]:
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", " ".join((text or "").split()))


def _clauses(sentence: str, section: type[Section]) -> list[str]:
    """Of a sentence that goes through settings (`a` is .., `b` is ..), what it says about each."""
    keys = "|".join(section.model_fields)
    parts = re.split(rf"[,;] (?:and )?(?=`(?:{keys})` (?!or ))", sentence) if sentence.startswith("`") else [sentence]
    return [part if part.endswith(".") else f"{part}." for part in parts]


def _named(section: type[Section], key: str) -> str:
    """What a section's docstring, or those of the sections that it extends, say about a setting: best where it comes
    first."""
    found = []
    for base in section.__mro__:
        if issubclass(base, Section):
            for sentence in _sentences(base.__dict__.get("__doc__")):
                found += [clause for clause in _clauses(sentence, section) if f"`{key}`" in clause]
    best = next((clause for clause in found if clause.startswith(f"`{key}`")), next(iter(found), ""))
    return re.sub(r"\bNone\b", "null", best)


def _allowed(section: type[Section], key: str) -> str:
    """The values that a section takes, in words; nothing where there is nothing to say."""
    field = section.model_fields[key]
    options = [part for part in (get_args(field.annotation) or (field.annotation,)) if part is not type(None)]
    kinds = [get_args(part.model_fields["kind"].annotation)[0] for part in options if _has_kind(part)]
    if get_origin(field.annotation) is Literal:
        return f"One of {', '.join(map(str, options))}." if len(options) > 1 else ""
    if kinds:
        return f"kind is one of {', '.join(kinds)}."
    limits = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(bound, name)
    }
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return f"{', '.join(f'{words[name]} {value:g}' for name, value in limits.items())}.".capitalize() if limits else ""


def _has_kind(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Section) and "kind" in part.model_fields
