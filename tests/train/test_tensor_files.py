"""The files of a checkpoint are safetensors, written without copies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sstf.train.checkpoint import DTYPES, write_tensors


def test_what_was_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 6).T}
    digest = write_tensors(tmp_path / "file", tensors)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_nothing_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_no_copy_is_made(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    tensors = {str(i): torch.ones(4_000_000) for i in range(8)}  # 128 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_tensors(tmp_path / "file", tensors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32_000  # kB
