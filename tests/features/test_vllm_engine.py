"""vLLM's hidden states against ours, in float32, where only the order of additions differs. A real vLLM: run
`scripts/verify_vllm.sh --install-only` once, then `pytest -m engine` with SSTF_VLLM_VENV as it was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from feature_samples import random_samples
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerBase

from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, extract, own_target, verify
from sstf.features.engines import VllmEngine
from sstf.targets import TargetConfig, load_configured
from sstf.types import HiddenTeacher, TokenSample

PYTHON = Path(os.environ.get("SSTF_VLLM_VENV", Path(__file__).parents[2] / ".venv-vllm")) / "bin" / "python"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: scripts/verify_vllm.sh --install-only"),
]


def test_hidden_states_are_ours(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Layers in an order of their own, the last layer among them, and a text as long as the context."""
    # vLLM's CPU kernels want heads of 32 channels or more.
    tiny_llama(hidden_size=128).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    ids = torch.randint(3, 290, (256,), generator=torch.Generator().manual_seed(9)).tolist()
    samples = [*random_samples(), TokenSample("as long as the context", ids, [t > 9 for t in range(256)])]
    source = TargetConfig(name=str(tmp_path / "tiny"), dtype="float32", device="cpu")
    plain = ExtractConfig(shard_tokens=256, batch_tokens=128)
    config = plain.model_copy(update={"engine": VllmEngine(kind="vllm", python=PYTHON, memory=0.2)})
    spec = FeatureSpec((4, 1, 7))
    whole = load_configured(source)
    extract(whole, samples, spec, plain, tmp_path / "ours", NoProgress())
    target = load_configured(own_target(config, source))
    assert extract(target, samples, spec, config, tmp_path / "theirs", NoProgress(), source)
    assert verify(tmp_path / "theirs", NoProgress()).faults == ()
    ours, theirs = FeatureStore(tmp_path / "ours"), FeatureStore(tmp_path / "theirs")
    assert (ours.ids, ours.lengths, ours.trained) == (theirs.ids, theirs.lengths, theirs.trained)
    assert sorted(path.name for path in ours.folder.iterdir()) == sorted(path.name for path in theirs.folder.iterdir())
    for i in range(len(ours)):
        a, b = ours[i], theirs[i]
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        assert torch.equal(a.teacher_token, b.teacher_token)
        assert isinstance(a.teacher, HiddenTeacher) and isinstance(b.teacher, HiddenTeacher)
        for found, expected in ((b.features, a.features), (b.teacher.hidden, a.teacher.hidden)):
            # Both are rounded to bfloat16: equal, or neighbours (2^-7 of the value apart at most).
            torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(b.teacher.lse, a.teacher.lse, rtol=0, atol=1e-4)
