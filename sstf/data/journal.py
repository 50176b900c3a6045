"""Answers as they come in, one line each: what a slow server has answered is never asked again.

Group files hold finished groups only (`groups`); hours of a large target may lie between two of them. The journal fills
that gap: a line is written as soon as its answer is there, and survives `kill -9` at any moment. It is a cache. A line
that was torn or altered does not match its checksum and is asked again, which is always right; so nothing here raises.
The file may be deleted once the groups it fed are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JournalEntry:
    """An answer under its key; `retokenised` says that its ids were made from text, by the tokenizer."""

    key: str
    token_ids: list[int]
    finished: bool
    retokenised: bool


class Journal:
    """The JSONL file `path`, one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[dict[str, JournalEntry], int]:
        """The whole entries by key, the later one of equal keys, and how many lines were damaged.

        The rest of a line that was being written when the process died is cut off the file: it is no damage, and the
        next line must not be glued to it.
        """
        if not self.path.exists():
            return {}, 0
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        entries = [_parse(line) for line in whole.splitlines()]
        return {entry.key: entry for entry in entries if entry is not None}, entries.count(None)

    def append(self, entry: JournalEntry) -> None:
        """Add one line, in a single write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = asdict(entry)
        line = json.dumps({"sha256": _checksum(row), **row}, separators=(",", ":")).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
            while written < len(line):  # the disk was full for a moment
                written += file.write(line[written:])


def _checksum(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]


def _parse(line: bytes) -> JournalEntry | None:
    try:
        row = json.loads(line)
        found = row.pop("sha256")
        return JournalEntry(**row) if found == _checksum(row) else None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
