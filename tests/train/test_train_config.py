"""What the training section accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sstf.config_loading import Section, load
from sstf.errors import ConfigError
from sstf.train.config import TrainConfig
from sstf.train.optim import AdamWConfig, MuonConfig
from sstf.train.schedule import ScheduleConfig


class Root(Section):
    train: TrainConfig


def read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Root, path).train


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "train: {epochs: 2}")
    assert (config.epochs, config.steps, config.precision) == (2, None, "bf16")
    assert (config.optimizer, config.schedule) == (AdamWConfig(), ScheduleConfig())
    assert config.optimizer.betas == (0.9, 0.95)


def test_an_optimiser_without_a_name_is_adamw(tmp_path: Path) -> None:
    assert read(tmp_path, "train: {steps: 5, optimizer: {learning_rate: 1e-3}}").optimizer == AdamWConfig(
        learning_rate=1e-3
    )
    assert read(tmp_path, "train: {steps: 5, optimizer: {kind: muon}}").optimizer == MuonConfig()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{epochs: 2, steps: 10}", "give either epochs or steps: both found"),
        ("{clip: 1.0}", "give either epochs or steps: neither found"),
        ("{steps: 0}", "train.steps: expected a number of at least 1, found 0"),
        ("{steps: 5, optimizer: {learning_rate: 0}}", "learning_rate: expected a number above 0.0, found 0"),
        ("{steps: 5, optimizer: {learning_rate: 1e9}}", "learning_rate: expected a number below 1.0, found 1000000000"),
        ("{steps: 5, optimizer: {betas: [0.9, 1.0]}}", "betas"),
        ("{steps: 5, optimizer: {learning_rte: 1e-3}}", 'Did you mean "learning_rate"?'),
        (
            "{steps: 5, optimizer: {kind: muonn}}",
            'expected one of adamw, muon, found "muonn" (text). Did you mean "muon"?',
        ),
        ("{steps: 5, optimizer: 3}", "expected one of adamw, muon, found 3 (integer)"),
        ("{steps: 5, precision: fp16}", "expected 'bf16' or 'fp32'"),
        ("{steps: 5, trackers: [wandbb]}", "train.trackers"),
        ("{steps: 5, schedule: {warmup_share: 1.5}}", "at most 1"),
        ("{steps: 5, batch_tokens: 4}", "train.batch_tokens"),
        ("{steps: 5, warm_start: a, resume_from: b}", "give either warm_start or resume_from: both found"),
        ("{steps: 5, validate_every: 30, real_decode: {every: 50}}", "expected a multiple of validate_every (30)"),
        ("{steps: 5, patience: 2, validation_conversations: 0}", "patience need held-out text"),
    ],
)
def test_errors(tmp_path: Path, section: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"train: {section}")
    assert says in str(caught.value)
    assert "run.yaml:1" in str(caught.value)
