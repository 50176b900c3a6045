"""The environments of engines, which `scripts/test_engines.sh` makes, and a real target's head to serve."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import Eagle3Config, build_method
from sstf.methods.base import TrainableMethod
from sstf.parity.texts import Text, write_texts
from sstf.targets import Target, load_target
from sstf.train.config import TrainConfig
from sstf.train.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
PROMPTS, NEW = 6, 48


def environment(variable: str, default: str, package: str) -> Path:
    """A virtual environment that holds a package; without one the test is skipped, and `make test-engines` says so."""
    venv = Path(os.environ.get(variable, REPOSITORY / default))
    if not list(venv.glob(f"lib/python*/site-packages/{package}/__init__.py")):
        pytest.skip(f"NOT TESTED: no {package} in {venv}; `make test-engines` installs it")
    return venv


@pytest.fixture(scope="session")
def vllm() -> Path:
    return environment("SSTF_VLLM_VENV", ".venv-vllm", "vllm")


@pytest.fixture(scope="session")
def speculators() -> Path:
    return environment("SSTF_SPECULATORS_VENV", ".venv-speculators", "speculators")


@dataclass(frozen=True)
class Learned:
    """A head that learned by heart what the target writes after the ladder's prompts, so that nearly every draft is
    accepted: an engine that accepts fewer does something else with it. In float32, because in bfloat16 near ties soon
    lead engines into other texts."""

    target: Target
    texts: list[Text]
    head: Path


@pytest.fixture(scope="session")
def real_target() -> Target:
    return load_target("smollm2-135m-instruct", "float32", "cpu")


@pytest.fixture(scope="session")
def learned(real_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    config = Eagle3Config(ttt_steps=3, draft_vocab_size=8192)
    return learn(real_target, config, tmp_path_factory.mktemp("learned"))


def learn(
    target: Target, config: Any, folder: Path, steps: int = 50, learning_rate: float = 1e-3, precision: str = "bf16"
) -> Learned:
    """Train a head of any method on the ladder's texts."""
    method = build_method(config)
    assert isinstance(method, TrainableMethod)
    texts = write_texts(target, PROMPTS, NEW)
    samples = [text.sample(f"t{i}") for i, text in enumerate(texts)]
    spec = method.feature_spec(target.spec)
    extract(target, samples, spec, ExtractConfig(), folder / "features", NoProgress())
    train = TrainConfig(
        steps=steps,
        step_tokens=2048,
        optimizer={"learning_rate": learning_rate},
        precision=precision,
        validation_conversations=0,
        validate_every=steps,
        checkpoint_every=steps,
    )
    Trainer(FeatureStore(folder / "features"), method, config, train, folder, 0).run(NoProgress(), "learned", {})
    return Learned(target, texts, folder / "head")
