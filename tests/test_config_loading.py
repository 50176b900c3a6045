"""Every kind of configuration mistake yields one line that says where, what was found and what was expected."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from sstf.config_loading import Section, dump, load
from sstf.errors import ConfigError


class Precision(enum.Enum):
    FP32 = "fp32"
    BF16 = "bf16"


class Train(Section):
    steps: int = Field(gt=0)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    warmup: int = Field(default=0, ge=0)
    precision: Precision = Precision.FP32
    budget: float | Literal["auto"] = "auto"

    @pydantic.model_validator(mode="after")
    def _warmup_fits(self) -> Train:
        if self.warmup > self.steps:
            raise ValueError(f"warmup ({self.warmup}) is longer than the run ({self.steps} steps); lower warmup")
        return self


class Eagle(Section):
    kind: Literal["eagle3"] = "eagle3"
    ttt_steps: int = 3
    taps: tuple[int, ...] | None = None


class Ngram(Section):
    kind: Literal["ngram"] = "ngram"
    ttt_steps: int = 1
    ngram: int = 3


class Source(Section):
    path: Path
    weights: dict[str, float] = {}


Method = Annotated[Eagle | Ngram, Field(discriminator="kind")]


class Run(Section):
    name: str = "run"
    verbose: bool = False
    train: Train
    method: Method = Eagle()
    sources: list[Source] = []
    stages: list[Method] = []


FILE = """\
name: first
train:
  steps: 100
  learning_rate: 1e-4
method:
  kind: eagle3
  taps: [2, 15, 27]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a configuration as `x.yaml`, so that the expected messages can be spelled out."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str) -> Path:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return Path("x.yaml")

    return write_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Run, path, overrides)
    return str(caught.value).split("\n")


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_a_file_becomes_typed_sections_with_defaults(write):
    config = load(Run, write(FILE))
    expected_train = Train(steps=100, learning_rate=0.0001)
    assert config == Run(name="first", train=expected_train, method=Eagle(taps=(2, 15, 27)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 0.0001), ("1E-4", 0.0001), ("5.e-1", 0.5), (".5", 0.5), ("1", 1.0), ("0.25", 0.25), ("1_0e-2", 0.1)],
)
def test_numbers_in_scientific_notation_are_numbers(write, text, value):
    assert load(Run, write(f"train: {{steps: 1, learning_rate: {text}}}")).train.learning_rate == value


@pytest.mark.parametrize("text", ["on", "no", "yes", "off", "2026-01-01", "12:30", "e5", "1e", "007"])
def test_what_yaml_1_1_would_reinterpret_stays_text(write, text):
    assert load(Run, write(f"{{name: {text}, train: {{steps: 1}}}}")).name == text


def test_sections_are_frozen_and_strict_in_python_too():
    train = Train(steps=1)
    with pytest.raises(pydantic.ValidationError):
        train.steps = 2  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        Train(steps="3")  # type: ignore[arg-type]


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_and_the_last_wins(write):
    path = write(FILE)
    config = load(Run, path, ["train.steps=5", "train.steps=7", "name=a=b", "method.taps=[1, 2]", "verbose=true"])
    assert (config.train.steps, config.name, config.verbose) == (7, "a=b", True)
    assert config.method == Eagle(taps=(1, 2))


def test_an_override_creates_absent_and_empty_sections(write):
    assert load(Run, write("name: x\n"), ["train.steps=5"]).train.steps == 5
    assert load(Run, write("train:\n"), ["train.steps=5"]).train.steps == 5


def test_changing_the_kind_keeps_the_other_keys(write):
    path = write("train: {steps: 1}\nmethod:\n  kind: eagle3\n  ttt_steps: 5\n")
    assert load(Run, path, ["method.kind=ngram", "method.ngram=4"]).method == Ngram(ttt_steps=5, ngram=4)


def test_a_key_left_over_from_another_kind_is_reported_where_it_stands(write):
    assert problems(write(FILE), "method.kind=ngram") == [
        "x.yaml:7: method.taps: unknown key. Known keys: kind, ttt_steps, ngram"
    ]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".steps=3", ""])
def test_override_without_key_or_value(write, override):
    assert problems(write(FILE), override) == [f"override {override}: expected key.sub=value, such as train.steps=100"]


def test_override_through_a_scalar(write):
    assert problems(write(FILE), "train.steps.x=1") == [
        "override train.steps.x=1: train.steps is 100 (integer), not a section; set train.steps as a whole"
    ]


def test_override_with_broken_yaml(write):
    (line,) = problems(write(FILE), "method.taps=[1,")
    assert line.startswith("override method.taps=[1,: the value is not valid YAML: while parsing a flow")


def test_problems_of_an_override_name_the_override(write):
    assert problems(write(FILE), "train.steps=abc", "train.stps=1") == [
        'override train.steps=abc: train.steps: expected an integer, found "abc" (text)',
        'override train.stps=1: train.stps: unknown key. Did you mean "steps"? '
        "Known keys: steps, learning_rate, warmup, precision, budget",
    ]


# ---- each kind of mistake --------------------------------------------------------------------------------------------

TRAIN = "train: {steps: 1}\n"  # line 1 of the files below, so that the mistake is the only one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  steps: 1\n  leraning_rate: 1\n",
            'x.yaml:3: train.leraning_rate: unknown key. Did you mean "learning_rate"? '
            "Known keys: steps, learning_rate, warmup, precision, budget",
        ),
        (
            TRAIN + "metod: {}\n",
            'x.yaml:2: metod: unknown key. Did you mean "method"? '
            "Known keys: name, verbose, train, method, sources, stages",
        ),
        (
            TRAIN + "method:\n  kind: ngram\n  ngrams: 2\n",
            'x.yaml:4: method.ngrams: unknown key. Did you mean "ngram"? Known keys: kind, ttt_steps, ngram',
        ),
        (
            TRAIN + "stages:\n- kind: ngram\n- kind: eagle3\n  tap: 2\n",
            'x.yaml:5: stages.1.tap: unknown key. Did you mean "taps"? Known keys: kind, ttt_steps, taps',
        ),
        (
            TRAIN + "sources:\n- path: a\n  paht: 2\n",
            'x.yaml:4: sources.0.paht: unknown key. Did you mean "path"? Known keys: path, weights',
        ),
        ("train:\n  steps: abc\n", 'x.yaml:2: train.steps: expected an integer, found "abc" (text)'),
        ("train:\n  steps: '3'\n", 'x.yaml:2: train.steps: expected an integer, found "3" (text)'),
        ("train:\n  steps: 3.5\n", "x.yaml:2: train.steps: expected an integer, found 3.5 (number)"),
        ("train:\n  steps: true\n", "x.yaml:2: train.steps: expected an integer, found true (true/false)"),
        ("train:\n  steps:\n", "x.yaml:2: train.steps: expected an integer, found nothing (null)"),
        ("train:\n  steps: 0\n", "x.yaml:2: train.steps: expected a number above 0, found 0 (integer)"),
        (
            "train:\n  steps: 1\n  learning_rate: 2\n",
            "x.yaml:3: train.learning_rate: expected a number of at most 1.0, found 2 (integer)",
        ),
        (
            "train:\n  steps: 1\n  learning_rate: .nan\n",
            "x.yaml:3: train.learning_rate: expected a finite number, found NaN (number)",
        ),
        (
            "train:\n  steps: 1\n  precision: fp23\n",
            "x.yaml:3: train.precision: expected 'fp32' or 'bf16', found \"fp23\" (text). Did you mean \"fp32\"?",
        ),
        (
            "train:\n  steps: 1\n  budget: aut\n",
            "x.yaml:3: train.budget: expected a number or 'auto', found \"aut\" (text)",
        ),
        (TRAIN + "name: 5\n", "x.yaml:2: name: expected text, found 5 (integer); put it in quotes"),
        (TRAIN + "verbose: yes\n", 'x.yaml:2: verbose: expected true or false, found "yes" (text)'),
        ("train: 3\n", "x.yaml:1: train: expected a section, found 3 (integer)"),
        ("train: [1, 2]\n", "x.yaml:1: train: expected a section, found a list of 2"),
        (TRAIN + "sources: a\n", 'x.yaml:2: sources: expected a list, found "a" (text)'),
        (
            TRAIN + "method:\n  kind: eagle3\n  taps: [1,\n    x]\n",
            'x.yaml:5: method.taps.1: expected an integer, found "x" (text)',
        ),
        (
            TRAIN + "sources:\n- path: a\n  weights:\n    code: x\n",
            'x.yaml:5: sources.0.weights.code: expected a number, found "x" (text)',
        ),
        ("name: a\n", "x.yaml: train: required but missing; expected a section"),
        ("name: a\ntrain: {}\n", "x.yaml:2: train.steps: required but missing; expected an integer"),
        (
            TRAIN + "sources:\n- weights: {}\n",
            "x.yaml:3: sources.0.path: required but missing; expected a path",
        ),
        (
            TRAIN + "method: {kind: eagle}\n",
            'x.yaml:2: method.kind: expected one of eagle3, ngram, found "eagle" (text). Did you mean "eagle3"?',
        ),
        (TRAIN + "method: eagle3\n", 'x.yaml:2: method: expected a section, found "eagle3" (text)'),
        (TRAIN + "method:\n  ngram: 3\n", "x.yaml:2: method.kind: required but missing; expected one of eagle3, ngram"),
        (
            TRAIN + "stages:\n- kind: x\n",
            'x.yaml:3: stages.0.kind: expected one of eagle3, ngram, found "x" (text).',
        ),
        (
            "train:\n  steps: 5\n  warmup: 9\n",
            "x.yaml:1: train: warmup (9) is longer than the run (5 steps); lower warmup",
        ),
        (
            "name: a\ntrain: {steps: 1}\nname: b\n",
            "x.yaml:3: name: written twice, first at x.yaml:1; remove one",
        ),
        (
            "train:\n  steps: 1\n  steps: 1\n",
            "x.yaml:3: train.steps: written twice, first at x.yaml:2; remove one",
        ),
        (TRAIN + "[a]: 1\n", "x.yaml:2: a key is a list or section; expected text"),
        ("train: &a {steps: 1}\n", "x.yaml:1: not valid YAML: anchors and aliases are not supported"),
        (TRAIN + "name: !!x aGk=\n", "x.yaml:2: not valid YAML: tags (tag:yaml.org,2002:x) are not supported"),
        (TRAIN + "name: *a\n", "x.yaml:2: not valid YAML: anchors and aliases are not supported"),
        ("- 1\n", "x.yaml:1: expected `key: value` lines at the top level"),
        ("", "x.yaml: the file is empty; expected `key: value` lines"),
        ("# nothing\n", "x.yaml: the file is empty; expected `key: value` lines"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not valid YAML: while scanning for the next token, "
         "found character '\\t' that cannot start any token"),
        ("a: [1\nb: 2\n", "x.yaml:2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: not valid YAML: expected a single document in the stream, "
         "but found another document"),
    ],
)  # fmt: skip
def test_message(write, text, message):
    assert problems(write(text)) == [message]


def test_a_missing_file_and_an_unreadable_one(write, tmp_path):
    assert problems(Path("none.yaml")) == ["none.yaml: no such file; expected a YAML configuration"]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read (Is a directory); expected a YAML file"]
    Path("latin.yaml").write_bytes(b"name: \xe9\n")
    assert problems(Path("latin.yaml")) == ["latin.yaml: not a UTF-8 text file; expected YAML"]


def test_all_problems_are_reported_together(write):
    path = write("nam: a\ntrain:\n  steps: abc\n  steps: 1\n")
    assert problems(path, "x") == [
        "x.yaml:4: train.steps: written twice, first at x.yaml:3; remove one",
        "override x: expected key.sub=value, such as train.steps=100",
        'x.yaml:3: train.steps: expected an integer, found "abc" (text)',
        'x.yaml:1: nam: unknown key. Did you mean "name"? Known keys: name, verbose, train, method, sources, stages',
    ]


def test_long_values_are_cut(write):
    (line,) = problems(write(f"train:\n  steps: {'a' * 500}\n"))
    assert line == f'x.yaml:2: train.steps: expected an integer, found "{"a" * 56}... (text)'


# ---- dump ------------------------------------------------------------------------------------------------------------

runs = st.builds(
    Run,
    name=st.text() | st.sampled_from(["1e-4", "on", "null", "3", "~", "", " a ", "a: b", "-", "true", "1_0", ".inf"]),
    verbose=st.booleans(),
    train=st.builds(
        Train,
        steps=st.integers(10, 2**40),
        learning_rate=st.floats(min_value=0, max_value=1, exclude_min=True),
        warmup=st.integers(0, 10),
        precision=st.sampled_from(Precision),
        budget=st.floats(allow_nan=False, allow_infinity=False) | st.just("auto"),
    ),
    method=st.builds(Eagle, kind=st.just("eagle3"), taps=st.none() | st.lists(st.integers(0, 99)).map(tuple))
    | st.builds(Ngram, kind=st.just("ngram"), ngram=st.integers(1, 9)),
    sources=st.lists(
        st.builds(
            Source,
            path=st.text("ab/.:é", min_size=1).map(Path),
            weights=st.dictionaries(st.text(max_size=4), st.floats(0, 1), max_size=3),
        ),
        max_size=2,
    ),
)


@given(config=runs)
def test_load_reads_back_what_dump_writes(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(Run, path) == config


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_line_separators_beyond_ascii_survive_a_dump(separator, tmp_path):
    config = Run(name=f"a{separator}b", train=Train(steps=3), method=Ngram())
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(Run, path) == config


def test_dump_shows_defaults_and_keeps_the_field_order():
    assert dump(Run(train=Train(steps=3), method=Ngram())) == (
        "name: run\nverbose: false\n"
        "train:\n  steps: 3\n  learning_rate: 0.001\n  warmup: 0\n  precision: fp32\n  budget: auto\n"
        "method:\n  kind: ngram\n  ttt_steps: 1\n  ngram: 3\nsources: []\nstages: []\n"
    )


def test_infinity_is_not_a_setting():
    with pytest.raises(pydantic.ValidationError):
        Train(steps=1, budget=math.inf)
