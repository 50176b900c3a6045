"""Strict configuration: a YAML file and overrides become one frozen section tree, or every problem in plain words.

Each package declares its own sections from `Section`; the root configuration composes them. This file knows none of
them: it reads, overrides, validates and explains. It holds no defaults and no cross-field rules.

The YAML dialect is the plain part of YAML 1.2: `1e-4` is a number, `on` and `no` are text, keys are text.
Tags, anchors and duplicate keys are refused, because each of them hides what a run was really given.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import SafeConstructor

from sstf.errors import ConfigError


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys forbidden, no silent coercion.

    An integer is accepted for a float; text is never accepted for a number, nor a number for text.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=False,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )


T = TypeVar("T", bound=Section)
KeyPath = tuple[str | int, ...]


def load(model: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read `path`, apply `overrides`, validate as `model`.

    Args:
        model: The root section.
        path: A YAML file whose top level is a mapping.
        overrides: `key.sub=value`, the value in YAML (`train.lr=1e-4`, `taps=[1, 2]`). Applied in order, so the last
            one wins. `method.kind=other` changes the kind and keeps the section's other keys.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: One line for every problem: where it is, which key, what was found, what was expected.
    """
    document = _read(path)
    for override in overrides:
        _apply_override(document, override)
    return _validated(model, document)


def load_options(model: type[T], options: Mapping[str, str]) -> T:
    """Validate options of a command, YAML text by key, as `model`.

    Raises:
        ConfigError: One line for every problem, as in `load`.
    """
    document = _Document({}, {(): "command line"}, [])
    for name, text in options.items():
        _set(document, (name,), text, f"--{name.replace('_', '-')}", document.data)
    return _validated(model, document)


def _validated(model: type[T], document: _Document) -> T:
    problems = list(document.problems)
    try:
        # JSON mode is what lets strict validation accept a YAML list for a tuple and text for a path or an enum.
        config = model.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        raise ConfigError("\n".join([*problems, *_explain(error, model, document)])) from None
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump(model: Section) -> str:
    """Write the effective configuration, defaults included, as YAML that `load` reads back to an equal value."""
    content = model.model_dump(mode="json")
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    # Raw, PyYAML's line separators beyond ASCII are read back as spaces; then everything beyond ASCII is escaped.
    if any(separator in text for separator in "\x85\u2028\u2029"):
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)
    return text


def inline(value: Any) -> str:
    """A plain value as YAML on one line, which `load` reads back to the same.

    >>> inline({"kind": "chain", "depth": 3}), inline("1e5"), inline(None)
    ('{kind: chain, depth: 3}', "'1e5'", 'null')
    """
    text: str = yaml.dump(value, Dumper=_InlineDumper, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


# ---- the YAML dialect ------------------------------------------------------------------------------------------------

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    # PyYAML's own pattern wants a dot, which makes 1e-4 a text.
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_RESOLVERS = {None: [(f"tag:yaml.org,2002:{name}", re.compile(rf"({rule})\Z")) for name, rule in _SCALARS.items()]}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not supported", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"tags ({event.tag}) are not supported", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS  # the loader's, so that text which looks like a number to it is quoted

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = all(isinstance(item, yaml.ScalarNode) for item in node.value)
        return node


class _InlineDumper(_Dumper):
    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super(_Dumper, self).represent_sequence(tag, sequence, flow_style=True)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=True)


# ---- reading and overriding ------------------------------------------------------------------------------------------


@dataclass
class _Document:
    """Plain data, and for each key in it where it came from (`file:line` or the override)."""

    data: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[str]

    def origin(self, key: KeyPath) -> str:
        """Where `key` was written; for an absent key, where the nearest enclosing section was."""
        return next(self.origins[key[:end]] for end in range(len(key), -1, -1) if key[:end] in self.origins)


def _read(path: Path) -> _Document:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file; expected YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        origin = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{origin}: not valid YAML: {_yaml_problem(error)}") from None
    if node is None:
        raise ConfigError(f"{path}: the file is empty; expected `key: value` lines")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected `key: value` lines at the top level")
    document = _Document({}, {(): str(path)}, [])
    document.data = _build(node, (), document, lambda part: f"{path}:{part.start_mark.line + 1}")
    return document


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    return ", ".join(text for text in (error.context, error.problem) if text)


def _build(node: yaml.Node, key: KeyPath, document: _Document, origin: Callable[[yaml.Node], str]) -> Any:
    """The plain value of `node`, recording in `document` the origin of each key and each key written twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.origins[(*key, index)] = origin(item)
        return [_build(item, (*key, index), document, origin) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return SafeConstructor().construct_document(node)
    section: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{origin(key_node)}: {_dotted(key)}a key is a list or section; expected text")
            continue
        name = key_node.value
        child = (*key, name)
        if name in section:
            first = document.origins[child]
            document.problems.append(f"{origin(key_node)}: {_dotted(child)}written twice, first at {first}; remove one")
            continue
        document.origins[child] = origin(key_node)
        section[name] = _build(value_node, child, document, origin)
    return section


def _apply_override(document: _Document, override: str) -> None:
    """Set one key of `document`, creating the sections on the way; a bad override is recorded as a problem."""
    origin = f"override {override}"
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        document.problems.append(f"{origin}: expected key.sub=value, such as train.steps=100")
        return
    section = document.data
    for end, name in enumerate(key[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            document.origins[key[:end]] = origin
        if not isinstance(section[name], dict):
            parent = ".".join(key[:end])
            document.problems.append(
                f"{origin}: {parent} is {_show(section[name])}, not a section; set {parent} as a whole"
            )
            return
        section = section[name]
    _set(document, key, text, origin, section)


def _set(document: _Document, key: KeyPath, text: str, origin: str, section: dict[str, Any]) -> None:
    """Put the value that is written as YAML in `text` under `key`, whose last part is in `section`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        document.problems.append(f"{origin}: the value is not valid YAML: {_yaml_problem(error)}")
        return
    document.origins = {path: where for path, where in document.origins.items() if path[: len(key)] != key}
    document.origins[key] = origin
    section[str(key[-1])] = None if node is None else _build(node, key, document, lambda _: origin)


# ---- explaining ------------------------------------------------------------------------------------------------------

# What pydantic's error types expected, with the names of its error context. Other types keep pydantic's own words.
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "bool_type": "true or false",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text matching {pattern}",
}
_TYPE_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    list: "a list",
    tuple: "a list",
    dict: "a section",
}


@dataclass(frozen=True)
class _Place:
    """A key as the user wrote it, and the annotation of what belongs there (None when that is not known)."""

    key: KeyPath
    annotation: Any


def _explain(error: ValidationError, model: type[Section], document: _Document) -> Iterator[str]:
    placed = [(_place(model, details), details) for details in error.errors(include_url=False)]
    # The branches of a union (a number or "auto") report one error each, in sequence; together they are one problem.
    for key, group in groupby(placed, key=lambda pair: pair[0].key):
        pairs = list(group)
        start = f"{document.origin(key)}: {_dotted(key)}"
        mismatches = [details for _, details in pairs if details["type"] in _EXPECTED]
        if mismatches:
            yield start + _mismatch(mismatches)
        for place, details in pairs:
            if details not in mismatches:
                yield start + _other_problem(place, details, model)


def _mismatch(errors: list[ErrorDetails]) -> str:
    wanted = [_EXPECTED[error["type"]].format(**error.get("ctx", {})) for error in errors]
    expected, found = " or ".join(dict.fromkeys(wanted)), errors[0]["input"]
    hint = ""
    if expected == "text" and isinstance(found, (bool, int, float)):
        hint = "; put it in quotes"
    elif errors[0]["type"] in ("literal_error", "enum"):
        hint = _suggest(found, re.findall(r"'([^']*)'", expected))
    return f"expected {expected}, found {_show(found)}{hint}"


def _other_problem(place: _Place, error: ErrorDetails, model: type[Section]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            section = _sections(_locate(model, error["loc"][:-1]).annotation)
            known = list(section[0].model_fields) if len(section) == 1 else []
            hint = _suggest(place.key[-1], known)
            if hint == "." and len(section) == 1:  # it may belong a level deeper
                hint = _suggest_below(str(place.key[-1]), section[0])
            return f"unknown key{hint} Known keys: {', '.join(known) or 'none'}"
        case "missing":
            expected = _describe(place.annotation)
            return f"required but missing{expected and f'; expected {expected}'}"
        case "union_tag_not_found":
            return f"required but missing; expected one of {', '.join(_tags(place))}"
        case "union_tag_invalid":
            tags = _tags(place)
            given = error["input"]
            found = given[place.key[-1]] if isinstance(given, dict) else given
            return f"expected one of {', '.join(tags)}, found {_show(found)}{_suggest(found, tags)}"
        case "value_error" | "assertion_error":
            return str(context["error"])
        case _:
            return f"{error['msg']}, found {_show(error['input'])}"


def _place(model: type[Section], error: ErrorDetails) -> _Place:
    place = _locate(model, error["loc"])
    if error["type"] not in ("union_tag_not_found", "union_tag_invalid"):
        return place
    # A key in quotes, or a function that is named after the key it reads: _kind().
    return _Place((*place.key, error["ctx"]["discriminator"].strip("'_()")), place.annotation)


def _locate(model: type[Section], location: KeyPath) -> _Place:
    """Follow a pydantic error location through the annotations, leaving out the union branches it names."""
    key: KeyPath = ()
    annotation: Any = model
    for part in location:
        options = list(_options(annotation))
        if len(options) > 1:
            annotation = next((option for option in options if _is_branch(option, part)), None)
            continue
        if not options:
            break
        (option,) = options
        kind, arguments = get_origin(option) or option, get_args(option)
        if _is_section(option):
            field = option.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        elif kind is tuple and Ellipsis not in arguments:
            annotation = dict(enumerate(arguments)).get(int(part))
        elif kind in (list, tuple, dict, Sequence) and arguments:
            annotation = arguments[-1] if kind is dict else arguments[0]
        else:
            break
        key = (*key, part)
    return _Place(key, annotation)


def _options(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation: unions opened, `Annotated` and None left out."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _options(member)
    elif annotation is not None and annotation is not type(None):
        yield annotation


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Section)


def _sections(annotation: Any) -> list[type[Section]]:
    return [option for option in _options(annotation) if _is_section(option)]


def _tags(place: _Place) -> list[str]:
    """The values of the discriminator at `place`, whose annotation is the union that it discriminates."""
    literals = [section.model_fields[str(place.key[-1])].annotation for section in _sections(place.annotation)]
    return [str(tag) for literal in literals for tag in get_args(literal)]


def _is_branch(option: Any, label: str | int) -> bool:
    """Whether a union member is the one that pydantic calls `label`: a discriminator value or a type's name."""
    if _is_section(option):
        literals = [field.annotation for field in option.model_fields.values()]
        return option.__name__ == label or any(
            label in get_args(literal) for literal in literals if get_origin(literal) is Literal
        )
    return getattr(get_origin(option) or option, "__name__", None) == str(label).partition("[")[0]


def _describe(annotation: Any) -> str:
    """The annotation in the user's words, empty when there is no short phrase for it."""
    phrases: dict[str, None] = {}
    for option in _options(annotation):
        if get_origin(option) is Literal:
            phrase = " or ".join(json.dumps(value) for value in get_args(option))
        else:
            phrase = "a section" if _is_section(option) else _TYPE_NAMES.get(get_origin(option) or option, "")
        phrases[phrase] = None
    return " or ".join(phrases) if all(phrases) else ""


def _suggest(word: Any, known: Sequence[str]) -> str:
    """Ends a sentence, with the nearest known word where there is one."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f'. Did you mean "{close[0]}"?' if close else "."


def _suggest_below(word: str, section: type[Section]) -> str:
    """As `_suggest`, from the keys of the sections inside `section`."""
    below = {
        key: f"{name}.{key}"
        for name, field in section.model_fields.items()
        for inner in _sections(field.annotation)
        for key in inner.model_fields
    }
    close = difflib.get_close_matches(word, below, n=1)
    return f'. Did you mean "{below[close[0]]}"?' if close else "."


def _show(value: Any) -> str:
    """A value from the file with its YAML type, cut where it is long."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'section'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({ {str: 'text', bool: 'true/false', int: 'integer', float: 'number'}[type(value)] })"


def _dotted(key: KeyPath) -> str:
    """`train.steps: `, ready to stand before a message; nothing for the root."""
    return ".".join(map(str, key)) + ": " if key else ""
