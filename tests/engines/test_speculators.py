"""The `speculators` library loads the export in its form, and computes our draft logits with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Learned, in_speculators

from sstf.features import ExtractConfig, FeatureSpec, OnlineFeatures
from sstf.formats import export_head, load_any
from sstf.heads import Eagle3Head
from sstf.methods.checkpoint import read_head
from sstf.parity.trace import trace_drafting

pytestmark = pytest.mark.engine
STEPS = 3


def test_speculators_computes_our_logits(speculators: Path, learned: Learned, tmp_path: Path) -> None:
    stored, target = read_head(learned.head), learned.target
    export_head(stored, "speculators", tmp_path / "export", str(target.model.name_or_path), target.frozen_head)
    source = OnlineFeatures(target, [learned.texts[0].sample("t")], FeatureSpec(stored.layers), ExtractConfig())
    batch = source.batch([0])
    probe = {"features": batch.features.float(), "tokens": batch.input_ids}
    found = in_speculators(speculators, "speculators_logits.py", tmp_path, str(STEPS), probe)
    theirs = found["logits"]  # [steps, seq, draft_vocab]
    assert found["layers"].tolist() == [layer + 1 for layer in stored.layers]  # the residual stream after k layers

    module = load_any(tmp_path / "export", target).module
    assert isinstance(module, Eagle3Head)
    rows = torch.arange(len(batch.input_ids) - STEPS)  # behind them, steps read tokens that are not there
    ours = trace_drafting(module, probe["features"], batch.input_ids, rows, STEPS)
    for step in range(STEPS):
        expected = ours.values[f"logits.{step}"]
        torch.testing.assert_close(theirs[step, rows], expected, atol=2e-2, rtol=1e-3)
        assert torch.equal(module.draft_tokens[theirs[step, rows].argmax(-1)], ours.drafted[step])
