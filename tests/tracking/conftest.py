"""Trackers that write where nobody else looks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Read by trackio when it is imported, which a test of another folder may do first.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="sstf-trackio-")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No keys, no settings of the person who runs the tests; returns the home that libraries see."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_TOKEN", "TRACKIO_S"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    return home
