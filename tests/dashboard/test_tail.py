from __future__ import annotations

from pathlib import Path

import pytest

from sstf.dashboard import tail as module
from sstf.dashboard.tail import Growth, Tail


def test_only_whole_new_lines_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.poll() == Growth(), "not there yet"
    path.write_bytes(b"one\ntw")
    assert tail.poll().lines == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n\n   \nthree\n")
    assert tail.poll() == Growth([b"two", b"three"])
    assert tail.poll() == Growth()


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(path)
    assert tail.poll().lines == [b"one", b"two"]
    with path.open("r+b") as file:  # the same file, other bytes where it was read
        file.write(b"xxx\nxxx\nnew\n")
    assert tail.poll() == Growth([b"new"])


@pytest.mark.parametrize("longer", [False, True])
def test_a_replaced_file_is_read_from_its_start(tmp_path: Path, longer: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\npart")
    tail = Tail(path)
    tail.poll()
    other = tmp_path / "other"
    other.write_bytes(b"one\n" + b"again\n" * (9 if longer else 1))
    other.replace(path)
    assert tail.poll() == Growth([b"one"] + [b"again"] * (9 if longer else 1), restarted=True)
    path.write_bytes(b"cut\n")  # the same file, shorter
    assert tail.poll() == Growth([b"cut"], restarted=True)
    assert tail.poll() == Growth()


def test_a_long_file_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b"%03d\n" % i for i in range(10)))
    tail = Tail(path)
    parts = [tail.poll().lines for _ in range(6)]
    assert parts[0] == [b"000", b"001"]
    assert [int(line) for part in parts for line in part] == list(range(10))


def test_a_line_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 8)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 20)
    tail = Tail(path)
    assert tail.poll().lines == [b"x" * 8]
    with path.open("ab") as file:
        file.write(b"x" * 20)
    assert tail.poll().lines == []
    with path.open("ab") as file:
        file.write(b"xx\ngood\n")
    assert tail.poll().lines == [b"good"]
