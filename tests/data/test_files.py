from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sstf.data import files
from sstf.data.files import CUT_OFF, Row, file_rows
from sstf.data.rows import BadRow
from sstf.errors import DataError

ROWS = [{"f": float("-inf")}, {"a": 'H"ä\n', "ok": True}, {"b": ["\U0001f600", 1.5, None]}, {}, {"c": "x" * 40}]


def read(path: Path) -> list[Row]:
    return list(file_rows(path, "s"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_array_read_in_small_pieces(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    for text in (json.dumps(ROWS, indent=indent), json.dumps(ROWS, indent=indent, ensure_ascii=False)):
        path.write_text("\ufeff \n" + text + "\n", encoding="utf-8")
        found = read(path)
        assert [row.value for row in found] == ROWS
        for number, row in enumerate(found, start=1):
            assert (row.fallback_id, row.source) == (f"s:{number}", "s")
        if indent:
            # Records begin at these lines of the file: a line break, the bracket, then two lines and one an item.
            assert [row.location for row in found][:2] == [f"{path}:3 (record 1)", f"{path}:6 (record 2)"]


@pytest.mark.parametrize("chunk", [1, 5])
def test_array_cut_off_anywhere(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    ends = [
        whole.index(json.dumps(row, ensure_ascii=False).encode()) + len(json.dumps(row, ensure_ascii=False).encode())
        for row in ROWS
    ]
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        found = read(path)
        complete = sum(record_end <= end for record_end in ends)
        assert [row.value for row in found[:complete]] == ROWS[:complete]
        for row in found[complete:]:
            assert row.cut_off and isinstance(row.value, BadRow) and row.value.reason == CUT_OFF
        assert len(found) - complete in (0, 1)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
def test_places_of_errors_in_an_array(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"b" 2}, {"c": "long enough to be no end"}]')
    with pytest.raises(DataError, match=r"a\.json:2 \(record 2\): broken JSON: Expecting ':' delimiter at column 7;"):
        read(path)
    path.write_text('[\n{"a": 1}, {"b" 2}, {"c": "long enough to be no end"}]')
    with pytest.raises(DataError, match=r"a\.json:2 \(record 2\): broken JSON: Expecting ':' delimiter at column 16;"):
        read(path)
    data = '[{"a": "ä"},\n {"b": "'.encode()
    path.write_bytes(data + b'\xff"}]')
    with pytest.raises(DataError, match=rf"a\.json:2: byte {len(data) + 1} of the file is not UTF-8"):
        read(path)


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=5),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_array_is_what_json_reads(rows: list[Any], chunk: int, ascii_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(rows, ensure_ascii=ascii_only).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert [row.value for row in read(path)] == rows


def test_large_array_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1 << 16)
    path = tmp_path / "a.json"
    # One character beyond the basic plane makes Python store four bytes a character.
    path.write_text(json.dumps([{"text": "\U0001f600" + "x" * 4000}] * 1000, ensure_ascii=False), encoding="utf-8")
    tracemalloc.start()
    try:
        assert sum(1 for _ in file_rows(path, "s")) == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5e6 < path.stat().st_size / 2


def test_lines_and_arrays_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n" * 5000 + '{"a": 1}\n\n{"a": 2}')
    assert [(row.value, row.location) for row in read(path)] == [
        ({"a": 1}, f"{path}:5001"),
        ({"a": 2}, f"{path}:5003"),
    ]
    path.write_text(" " * 5000 + "[]")
    assert read(path) == []
