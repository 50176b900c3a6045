"""The new lines of a file that grows, without reading the old ones again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 1 << 20  # bytes a call: a long log comes in several
LONGEST = 1 << 18  # bytes of a line; what is longer is damage


@dataclass(frozen=True)
class Growth:
    """New lines. `restarted`: the file is another now (a resumed training replaces its log), read from its start."""

    lines: list[bytes] = field(default_factory=list)
    restarted: bool = False


class Tail:
    """Follows the file at `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset = 0
        self._part = b""  # of a line whose end is not written yet
        self._too_long = False  # the rest of this line is passed over

    def poll(self) -> Growth:
        """Whole lines since the last call, without their line ends; at most `CHUNK` bytes of them.

        Of a line that is too long the beginning comes, so that its reader counts it as damaged.
        """
        try:
            found = self.path.stat()
            restarted = self._inode is not None and (found.st_ino != self._inode or found.st_size < self._offset)
            if restarted:
                self._offset, self._part, self._too_long = 0, b"", False
            self._inode = found.st_ino
            if found.st_size == self._offset:
                return Growth(restarted=restarted)
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._inode:  # replaced this moment
                    return Growth(restarted=restarted)
                file.seek(self._offset)
                new = file.read(CHUNK)
        except OSError:  # not there yet, or unreadable: asked again next time
            return Growth()
        self._offset += len(new)
        return Growth(self._split(new), restarted)

    def _split(self, new: bytes) -> list[bytes]:
        *lines, self._part = (self._part + new).split(b"\n")
        if self._too_long and lines:
            del lines[0]
            self._too_long = False
        if self._too_long:
            self._part = b""
        elif len(self._part) > LONGEST:
            lines.append(self._part[:LONGEST])
            self._part, self._too_long = b"", True
        return [line for line in lines if line.strip()]
