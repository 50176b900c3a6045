"""The `speculators` library loads heads that draft in one pass, and its own modules compute our draft logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_speculators
from torch import Tensor
from torch.nn import functional as F

from sstf.formats import export_head, load_any
from sstf.heads import BlockHead, DSparkHead, PEagleHead
from sstf.methods import DFlashConfig, DSparkConfig, PEagleConfig, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import StoredHead
from sstf.targets import Target

pytestmark = pytest.mark.engine
LAYERS, BLOCK, DEPTH, SEQ = (1, 3, 4), 4, 4, 40


def exported(target: Target, config: Any, folder: Path, draft_vocab: int = 300) -> Any:
    """A random head in speculators' form, and the module that is read from there."""
    method = build_method(config)
    assert isinstance(method, TrainableMethod)
    torch.manual_seed(3)
    head = method.build_head(target.spec, target.frozen_head, torch.arange(300)[-draft_vocab:])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    stored = StoredHead(config, dict(head.state_dict()), LAYERS, target.spec, {})
    export_head(stored, "speculators", folder / "export", str(target.model.name_or_path), target.frozen_head)
    module: Any = load_any(folder / "export", target).module
    return module


def computed(venv: Path, folder: Path, kind: str, features: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What speculators computes; the layers that it would read are ours, as it counts."""
    found = in_speculators(venv, "speculators_parallel.py", folder, kind, {"features": features, "tokens": tokens})
    assert found["layers"].tolist() == [layer + 1 for layer in LAYERS]  # the residual stream after k layers
    return found


@pytest.fixture
def probe() -> tuple[Tensor, Tensor]:
    """Features of x_t and tokens x_t."""
    torch.manual_seed(5)
    return torch.randn(SEQ, len(LAYERS) * 64), torch.randint(300, (SEQ,))


@pytest.mark.parametrize("draft_vocab", [None, 200])
def test_dflash(
    draft_vocab: int | None, speculators: Path, tiny_target: Target, probe: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    config = DFlashConfig(layers=LAYERS, num_layers=2, block_size=BLOCK, mask_token_id=7, draft_vocab_size=draft_vocab)
    head = exported(tiny_target, config, tmp_path, draft_vocab or 300)
    assert isinstance(head, BlockHead)
    features, tokens = probe
    found = computed(speculators, tmp_path, "dflash", features, tokens)
    if draft_vocab:
        head.lm_head = head.lm_head.bfloat16().float()  # its rows go along in bfloat16
    rows = found["anchors"][1:] - 1  # that of x_{t+1} is row t's; of x_0 there is none here
    with torch.no_grad():
        ours = F.linear(head.fill(features[:-1], tokens[1:], (SEQ - 1,), rows.tolist()), head.lm_head)
    theirs = found["logits"][1:, 1:]  # the anchor predicts nothing
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.99 and len(ours) > 30


def test_dspark(speculators: Path, tiny_target: Target, probe: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    config = DSparkConfig(layers=LAYERS, num_layers=2, block_size=BLOCK, mask_token_id=7, rank=8)
    head = exported(tiny_target, config, tmp_path)
    assert isinstance(head, DSparkHead)
    features, tokens = probe
    found = computed(speculators, tmp_path, "dspark", features, tokens)
    rows = found["anchors"][1:] - 1
    with torch.no_grad():
        states = head.fill(features[:-1], tokens[1:], (SEQ - 1,), rows.tolist())
        before = head.path_start(tokens[rows[:, None] + 1 + torch.arange(BLOCK)])  # the text's token at each slot
        ours = F.linear(states, head.lm_head) + F.linear(head.low_rank(states, before), head.correction)
        sure = head.confidence(states, before)
    torch.testing.assert_close(found["logits"][1:], ours, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found["confidence"][1:], sure, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("draft_vocab", [300, 200])
def test_p_eagle(
    draft_vocab: int, speculators: Path, tiny_target: Target, probe: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    config = PEagleConfig(layers=LAYERS, num_layers=2, depth=DEPTH, mask_token_id=7, draft_vocab_size=draft_vocab)
    head = exported(tiny_target, config, tmp_path, draft_vocab)
    assert isinstance(head, PEagleHead)
    features, tokens = probe
    found = computed(speculators, tmp_path, "peagle", features, tokens)
    head.embeddings = head.embeddings.bfloat16().float()  # they go along in bfloat16
    everywhere = [torch.arange(SEQ - DEPTH)] * DEPTH
    with torch.no_grad():
        outs = head.draft(features[:-1], tokens[1:], (SEQ - 1,), everywhere)
        ours = head.lm_head(head.norm(outs)).view(DEPTH, SEQ - DEPTH, -1)
    # It drafts in front of the text as well, and close to its end.
    there = (found["rows"] >= 0) & (found["rows"] < SEQ - DEPTH)
    rows, depths = found["rows"][there], found["depths"][there]
    assert depths.bincount().tolist()[0] == SEQ - DEPTH and int(depths.max()) == DEPTH - 1
    torch.testing.assert_close(found["logits"][there], ours[depths, rows], atol=1e-3, rtol=1e-3)
