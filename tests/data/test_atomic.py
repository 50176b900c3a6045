from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sstf.data.atomic import write_bytes_atomic, write_json_atomic


def test_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_bytes_atomic(path, b"old")
    write_json_atomic(path, {"ä": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
