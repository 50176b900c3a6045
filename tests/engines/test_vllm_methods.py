"""vLLM serves heads of every method that it knows as our decoder does, or says what it lacks on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NEW, PROMPTS, learn
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from sstf.data.progress import NoProgress
from sstf.errors import WorkerError
from sstf.formats import export_head, speculative_config
from sstf.methods import DFlashConfig, DSparkConfig, Eagle3Config, EagleConfig, MedusaConfig, PEagleConfig
from sstf.methods.checkpoint import read_head, save_head
from sstf.methods.dspark import DSparkMethod
from sstf.parity.ladder import ParitySettings, climb
from sstf.parity.served import Serving, served
from sstf.targets import Target, load_target

pytestmark = pytest.mark.engine
WITHIN = 0.05  # of our decoder's accepted length

METHODS: dict[str, Any] = {
    "medusa": MedusaConfig(heads=3),
    "eagle": EagleConfig(ttt_steps=3, token_weight=1.0),
    "eagle3": Eagle3Config(ttt_steps=3, num_layers=2, draft_vocab_size=200),
    "p_eagle": PEagleConfig(num_layers=2, depth=3, draft_vocab_size=200),
    "dflash": DFlashConfig(block_size=4, num_layers=1, layers=(1, 3, 5)),
}


@pytest.fixture(scope="module")
def small_target(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target whose texts any head learns in seconds. vLLM's CPU build has no attention heads of less than 32."""
    folder = tmp_path_factory.mktemp("small") / "target"
    tiny_llama(num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return load_target(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", METHODS)
def test_vllm_accepts_what_our_decoder_accepts(kind: str, vllm: Path, small_target: Target, tmp_path: Path) -> None:
    learned = learn(small_target, METHODS[kind], tmp_path, steps=80, learning_rate=5e-3, precision="fp32")
    settings = ParitySettings(engines=("vllm",), prompts=PROMPTS, max_new_tokens=NEW, vllm=vllm)
    parity = climb(learned.head, small_target, settings, "fp32", NoProgress())
    print("\n" + parity.sentence)
    ours, theirs = parity.rungs[-2:]
    assert theirs.name == "vllm" and ours.accepted_length is not None and theirs.accepted_length is not None
    assert ours.accepted_length > 1.5  # there is something to lose
    assert theirs.accepted_length == pytest.approx(ours.accepted_length, rel=WITHIN)
    assert parity.passed, parity.faults


def test_what_vllm_says_to_dspark_on_a_cpu(vllm: Path, small_target: Target, tmp_path: Path) -> None:
    """It needs the runner that only GPUs have; a later version that runs it makes this fail."""
    config = DSparkConfig(block_size=3, num_layers=1, layers=(1, 3, 5), rank=8)
    method = DSparkMethod(config)
    frozen = small_target.frozen_head
    head = method.build_head(small_target.spec, frozen, torch.arange(len(frozen.lm_head)))
    save_head(tmp_path / "head", config, head, small_target.spec, {})
    export_head(read_head(tmp_path / "head"), "vllm", tmp_path / "vllm", frozen=frozen)
    speculative = speculative_config("dspark", str(tmp_path / "vllm"), 3)
    serving = Serving(vllm, Path(small_target.model.name_or_path), speculative, "float32", 256)
    with (
        pytest.raises(WorkerError, match="Model Runner V1 does not support: dspark speculative decoding"),
        served(serving),
    ):
        pass
