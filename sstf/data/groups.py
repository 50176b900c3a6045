"""Generated rows, written in groups: `kill -9` loses at most the group that was being generated.

A group file is JSONL. Its first line says what the rows depend on (`fingerprint`) and how to tell that they are whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sstf.data.atomic import jsonl_bytes, write_bytes_atomic
from sstf.errors import DamagedDataError, DataError


def fingerprint(*parts: Any) -> str:
    """A short, stable hash of JSON values: equal parts give equal hashes in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the chat template: what token ids of generated text depend on."""
    return fingerprint(tokenizer.get_vocab(), tokenizer.chat_template)


@dataclass(frozen=True)
class GroupFiles:
    """The files `folder/<prefix>-00000.jsonl`, ...; `made_from` is a fingerprint of what all groups depend on."""

    folder: Path
    prefix: str
    made_from: str

    def path(self, index: int) -> Path:
        """Where group `index` lies."""
        return self.folder / f"{self.prefix}-{index:05d}.jsonl"

    def write(self, index: int, depends_on: Any, rows: list[dict[str, Any]]) -> None:
        """Write a finished group in one step; `depends_on` is any JSON value that its rows are made from."""
        body = jsonl_bytes(rows)
        checksum = hashlib.sha256(body).hexdigest()
        header = {"fingerprint": fingerprint(self.made_from, depends_on), "rows": len(rows), "sha256": checksum}
        write_bytes_atomic(self.path(index), jsonl_bytes([header]) + body)

    def read(self, index: int, depends_on: Any) -> list[dict[str, Any]] | None:
        """The rows of a finished group, or None if it is not there yet.

        Raises:
            DataError: The group was made from other settings or conversations.
            DamagedDataError: The file is not what was written.
        """
        path = self.path(index)
        if not path.exists():
            return None
        first, _, body = path.read_bytes().partition(b"\n")
        try:
            header = json.loads(first)
            found, checksum = header["fingerprint"], header["sha256"]
        except (ValueError, TypeError, KeyError):
            raise DamagedDataError(f"{path} has no readable first line; delete it and run again.") from None
        if checksum != hashlib.sha256(body).hexdigest():
            raise DamagedDataError(f"{path} does not match its checksum; delete it and run again.")
        if found != fingerprint(self.made_from, depends_on):
            raise DataError(
                f"{path} was generated from other settings, conversations or another target than this run's; "
                f"use another output folder, or delete {self.folder} to generate anew."
            )
        return [json.loads(line) for line in body.splitlines()]
