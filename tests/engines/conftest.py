"""The environments of engines, which `scripts/test_engines.sh` makes, and a real target's head to serve."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from learning import learn_texts
from safetensors.torch import load_file, save_file
from torch import Tensor

from sstf.methods import Eagle3Config
from sstf.parity.texts import Text, write_texts
from sstf.targets import Target, load_target

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
    texts = write_texts(target, PROMPTS, NEW)
    return Learned(target, texts, learn_texts(target, texts, config, folder, steps, 2048, learning_rate, precision))


def in_speculators(
    venv: Path, program: str, folder: Path, argument: str, probe: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What a program beside this file computes there from `probe`, with the export in `folder`."""
    save_file(probe, folder / "probe.safetensors")
    done = subprocess.run(
        [venv / "bin/python", Path(__file__).with_name(program), folder, argument],
        capture_output=True,
        text=True,
        timeout=300,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "logits.safetensors")
