"""Fixtures over `pipeline_runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_runs import WriteConfig, base_config, merge, open_run, write_conversations, write_suite


@pytest.fixture
def write_config(tiny_target_folder: Path, tmp_path: Path) -> WriteConfig:
    """Writes `run.yaml` (and the data and suite it names); `train__steps=2` changes `train.steps`, None removes."""
    write_conversations(tmp_path / "conversations.jsonl", 12)
    write_suite(tmp_path / "suite.jsonl")

    def write(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        fields = merge(base_config(tiny_target_folder, tmp_path), {k.replace("__", "."): v for k, v in changes.items()})
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished(tiny_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of which every stage is done. Tests that damage its results work on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    write_conversations(folder / "conversations.jsonl", 12)
    write_suite(folder / "suite.jsonl")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(base_config(tiny_target_folder, folder)), encoding="utf-8")
    open_run(config).up_to("eval", "export")
    return config
