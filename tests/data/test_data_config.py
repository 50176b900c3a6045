from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from sstf.data.config import DataConfig, HubSource, JsonlSource, RegenerateAnswers


def parse(**values: object) -> DataConfig:
    return DataConfig.model_validate_json(json.dumps(values))


def test_defaults_regenerate() -> None:
    config = parse(source={"kind": "hub", "name": "org/set"})
    assert isinstance(config.source, HubSource)
    assert isinstance(config.answers, RegenerateAnswers)
    assert (config.answers.temperatures, config.max_length, config.on_bad_row) == ((0.0, 0.8), 1024, "stop")


def test_one_path_or_several() -> None:
    one, two = parse(source={"kind": "jsonl", "path": "a"}), parse(source={"kind": "jsonl", "path": ["a", "b"]})
    assert isinstance(one.source, JsonlSource)
    assert isinstance(two.source, JsonlSource)
    assert (str(one.source.path), len(two.source.path)) == ("a", 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"source": {"kind": "other"}}, "'sample', 'jsonl', 'hub', 'package', 'self_written'"),
        ({"source": {"kind": "jsonl", "path": []}}, "at least 1 item"),
        ({"source": {"kind": "sample"}, "max_lenght": 1}, "max_lenght"),
        ({"source": {"kind": "sample"}, "max_length": 1}, "greater than or equal to 2"),
        ({"source": {"kind": "sample"}, "answers": {"kind": "regenerate", "temperatures": []}}, "at least 1 item"),
        ({"source": {"kind": "self_written", "conversations": 5}, "answers": {"kind": "keep"}}, "nothing to keep"),
    ],
)
def test_contradictions_are_named(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        parse(**values)
