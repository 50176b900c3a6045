"""The real wandb, with no key and no network (`tests/tracking` has what needs no wandb)."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
from tiny_store import metrics, train, train_config

from sstf.features import FeatureStore


def test_without_a_key_it_works_offline(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra: pip install sstf[wandb]")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a key would lie
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        train(store, tmp_path / "run", train_config(steps=3, trackers=("wandb",)))
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 20
    while b"train/loss/0" not in record.read_bytes():  # wandb's own process writes it, at its leisure
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 3]
