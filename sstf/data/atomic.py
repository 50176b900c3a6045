"""Files that are either whole or absent, also after a power cut.

A full disk raises the plain `OSError`; the caller knows what it was writing and how to say so.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there in one step. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random too: processes of several machines or containers may share a folder, and have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside the folder `path` survive a power cut: they live in the folder, not in the files."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, see `write_bytes_atomic`."""
    write_bytes_atomic(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def jsonl_bytes(rows: list[dict[str, Any]]) -> bytes:
    """One compact JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    return "".join(line + "\n" for line in lines).encode()
