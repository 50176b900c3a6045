"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from sstf.heap import trim

def resident():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

blocks = [torch.ones(200_000) for _ in range(400)]  # 0.8 MB each
torch.ones(6_000_000)  # freed at once: from now on glibc takes blocks of that size from its heap
more = [torch.ones(2_000_000) for _ in range(40)]  # 8 MB each
pin = torch.ones(1000)
del blocks, more
before = resident()
trim()
print(before, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_free_memory_goes_back() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after <= before - 100  # some 600 MB were freed; how much of it stayed is up to the allocator
