"""What the training section accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sstf.config_loading import Section, load
from sstf.errors import ConfigError
from sstf.train.config import TrainConfig


class Root(Section):
    train: TrainConfig


def read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Root, path).train


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "train: {epochs: 2}")
    assert (config.epochs, config.steps, config.precision, config.betas) == (2, None, "bf16", (0.9, 0.95))


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{epochs: 2, steps: 10}", "give either epochs or steps: both found"),
        ("{learning_rate: 1e-4}", "give either epochs or steps: neither found"),
        ("{steps: 0}", "train.steps: expected a number of at least 1, found 0"),
        ("{steps: 5, betas: [0.9, 1.0]}", "expected a number below 1"),
        ("{steps: 5, precision: fp16}", "expected 'bf16' or 'fp32'"),
        ("{steps: 5, learning_rte: 1e-3}", 'Did you mean "learning_rate"?'),
        ("{steps: 5, trackers: [wandbb]}", "expected 'wandb'"),
        ("{steps: 5, warmup_share: 1.5}", "at most 1"),
    ],
)
def test_errors(tmp_path: Path, section: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"train: {section}")
    assert says in str(caught.value)
    assert "run.yaml:1" in str(caught.value)
