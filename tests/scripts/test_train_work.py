"""The counts behind `scripts/bench_train.py`, by hand and against torch's own counter; the patches of its rival."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sstf.targets import TargetSpec


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SPEC = TargetSpec(
    name="tiny", fingerprint="", architecture="", dtype="bfloat16", hidden_size=8, num_layers=4, vocab_size=64,
    num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=16, rms_norm_eps=1e-5, rope_theta=1e4,
    max_position_embeddings=64,
)  # fmt: skip


def test_work_of_a_token_by_hand() -> None:
    work = script("train_work")
    # 10 rows, all supervised, draft vocabulary 32, 2 TTT steps; operations a token, forward:
    # fc 2*24*8 = 384; q, k, v 2*16*(8 + 2*2*2) = 512; o 2*8*8 = 128; mlp 2*3*8*16 = 768; lm_head 2*8*32 = 512
    weights = 2 * 384 + 2 * 3 * (512 + 128 + 768 + 512) + 512
    # 4*4*2 = 32 operations a key seen: 5.5 keys at step 0, 6.5 at step 1; forward and twice that backward
    attention = 3 * 32 * (5.5 + 6.5)
    assert work.mflop_per_token(SPEC, 2, 32, 10, 1.0) == pytest.approx((weights + attention) / 1e6)
    # Half of the positions supervised: half of lm_head and teacher. lm_head frozen: no product for its own gradient.
    half = weights - (2 * 3 * 512 + 512) / 2
    assert work.mflop_per_token(SPEC, 2, 32, 10, 0.5) == pytest.approx((half + attention) / 1e6)
    assert work.mflop_per_token(SPEC, 2, 32, 10, 1.0, False) == pytest.approx((weights - 2 * 512 + attention) / 1e6)


def test_products_are_those_that_torch_counts() -> None:
    rows, draft_vocab = 10, 32
    shapes = [
        (16, 8),
        (16, 4),
        (16, 4),
        (8, 8),
        (8, 16),
        (8, 16),
        (16, 8),
        (8, draft_vocab),
    ]  # q k v o gate up down head
    features, teacher = torch.randn(rows, 24), torch.randn(draft_vocab, 8)
    weights = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    fc = torch.randn(24, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        g = features @ fc
        for _ in range(2):
            outputs = [torch.randn(rows, len(w), requires_grad=True) @ w for w in weights]
            (sum(out.sum() for out in outputs) + g.sum() / 2).backward(retain_graph=True)
            g = g.detach()  # fc runs once
        with torch.no_grad():
            torch.randn(rows, 8) @ teacher.T
    counted = sum(p.mflop for p in script("train_work").products(SPEC, 2, draft_vocab, rows, 1.0))
    assert counted == pytest.approx(counter.get_total_flops() / 1e6)


def test_patches_apply_once_and_refuse_another_text() -> None:
    compare = script("compare_speculators")
    lines = ["self.local_rank = get_local_rank()", 'x = acc.type if acc is not None else "cuda"']
    lines += ["        torch.accelerator.synchronize()", "            torch.accelerator.synchronize()"]
    once = compare.patched("\n".join(lines))
    assert once.splitlines()[:2] == ['self.local_rank = "cpu"', 'x = acc.type if acc is not None else "cpu"']
    assert once.count("torch.accelerator.is_available() and torch.accelerator.synchronize()") == 2
    assert compare.patched(once) == once
    with pytest.raises(ValueError, match="was found 1 times, expected 2"):
        compare.patched("\n".join(lines[:-1]))
