"""JSON files that vouch for themselves: their first entry is the SHA-256 of all their other bytes.

    {
      "checksum": "…",
      "format": 2,
      …

The checksum is that of the file as it is with the checksum left out, so every single byte counts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sstf.data.atomic import write_bytes_atomic

HEAD = b'{\n  "checksum": "'
DIGEST = 64  # hexadecimal digits


class NotSealedError(ValueError):
    """The file holds no checksum where one is expected."""


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write `value` with its checksum; see `write_bytes_atomic`."""
    text = (json.dumps({"checksum": "", **value}, ensure_ascii=False, indent=2) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    write_bytes_atomic(path, HEAD + digest + text[len(HEAD) :])


def read_sealed(path: Path) -> dict[str, Any]:
    """Inverse of `write_sealed`.

    Raises:
        FileNotFoundError: there is no such file.
        NotSealedError, ValueError: see `unsealed`.
    """
    return unsealed(path.read_bytes())


def unsealed(data: bytes) -> dict[str, Any]:
    """The content of a sealed file, without its checksum.

    Raises:
        NotSealedError: it does not begin with a checksum.
        ValueError: it was altered or cut off.
    """
    if not data.startswith(HEAD):
        raise NotSealedError("it does not begin with its checksum")
    found, rest = data[len(HEAD) : len(HEAD) + DIGEST], data[len(HEAD) + DIGEST :]
    if hashlib.sha256(HEAD + rest).hexdigest().encode() != found:
        raise ValueError("its checksum differs from its content")
    value: dict[str, Any] = json.loads(data)
    del value["checksum"]
    return value
