"""Rows of local files: JSON lines, one JSON array (each plain or `.gz`), and Parquet.

Files are read as a stream, so that a large one takes no more memory than its rows. An array that was cut off gives all
its whole records.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sstf.data.rows import BadRow
from sstf.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
CUT_OFF = "cut off at the end of the file"
# Distance from the end of the text at which a decoding error may be reported: half a `\uXXXX`, `false` or `-Infinity`.
_CUT_MARGIN = 8
_CHUNK = 1 << 22  # bytes read at once from an array
_PARQUET_BATCH = 256  # rows; a conversation takes kilobytes


@dataclass(frozen=True)
class Row:
    """A decoded row, or why it could not be decoded, and where it came from."""

    value: Any | BadRow
    location: str  # for messages: file:line
    fallback_id: str
    source: str
    cut_off: bool = False


def expand(path: Path) -> list[Path]:
    """The files that a path names: itself, the data files in a folder, or those that match a pattern; sorted.

    Raises:
        DataError: A folder or a pattern gives no file.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not found:
            raise DataError(f"The folder {path} holds no data file; expected names ending in {', '.join(SUFFIXES)}.")
        return found
    if not path.exists() and any(character in str(path) for character in "*?["):
        anchor = Path(path.anchor)
        found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        if not found:
            raise DataError(f"No file matches {path}.")
        return found
    return [path]


def file_rows(path: Path, source: str) -> Iterator[Row]:
    """The rows of one file in order; `source` begins the ids of rows without one.

    Raises:
        DataError: The file is missing, unreadable, or broken in a way that hides where its next row begins.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, source)
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if _is_array(file):
                yield from _array_rows(file, path, source)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield Row(_decode_line(line), f"{path}:{number}", f"{source}:{number}", source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); copy or download it again.") from error
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; expected a .jsonl or .json file, plain or .gz, a .parquet file, a folder of them, "
            "or a pattern."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def without_nulls(value: Any) -> Any:
    """Arrow gives every object the fields of all others, null where it had none: those are left out again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(item) for item in value]
    return value


def _parquet_rows(path: Path, source: str) -> Iterator[Row]:
    # Takes part of a second to import, and only this form needs it.
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(without_nulls(value), f"{path}:{number}", f"{source}:{number}", source)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no whole Parquet file ({error}); copy or download it again.") from error


def _is_array(file: BinaryIO | gzip.GzipFile) -> bool:
    start = b""
    while not start and (chunk := file.read(1 << 12)):
        start = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _decode_line(line: bytes) -> Any | BadRow:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        return BadRow("broken text", f"byte {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(
            "broken JSON", f"{error.msg} at column {error.colno}; expected one JSON object a line, or one array of them"
        )


class _Window:
    """The part of a file's text that is being decoded: read chunk by chunk, dropped once it is done with."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, path: Path) -> None:
        self.text = ""
        self.position = 0
        self._file, self._path = file, path
        # An incremental decoder leaves out half a character at the end in place of failing on it.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self._line, self._counted = 1, 0  # the file's line at position `_counted` of `text`
        self._column = 0  # of the beginning of `text` in its line

    def more(self) -> bool:
        """Read on and drop what lies before `position`; False at the end of the file."""
        rest = len(self.text) - self.position
        # Chunks grow with the record that does not fit, so that a huge one is not decoded again and again.
        data = self._file.read(max(_CHUNK, 4 * rest))
        if not data:
            return False
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError as error:
            line = self.line(len(self.text)) + data.count(b"\n", 0, max(0, error.start - pending))
            byte = self._bytes - pending + error.start + 1
            raise DataError(f"{self._path}:{line}: byte {byte} of the file is not UTF-8; convert the file.") from None
        self._bytes += len(data)
        line_start = self.text.rfind("\n", 0, self.position)
        self._column = self._column + self.position if line_start < 0 else self.position - line_start - 1
        self.line(self.position)
        self.text, self.position, self._counted = self.text[self.position :] + text, 0, 0
        return True

    def skip(self, characters: str) -> bool:
        """Move to the next character that is none of these; False at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in characters:
                    return True
                self.position += 1
            if not self.more():
                return False

    def line(self, position: int) -> int:
        """The file's line at a position of `text`, no earlier than the last one that was asked for."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def column(self, error: json.JSONDecodeError) -> int:
        """The column of an error in its line, from 1."""
        return error.colno + (self._column if error.lineno == 1 else 0)


def _array_rows(file: BinaryIO | gzip.GzipFile, path: Path, source: str) -> Iterator[Row]:
    window, decoder, record = _Window(file, path), json.JSONDecoder(), 0
    window.skip(" \t\r\n")
    window.position += 1  # the opening bracket
    while window.skip(", \t\r\n" if record else " \t\r\n") and window.text[window.position] != "]":
        record += 1
        location, fallback_id = f"{path}:{window.line(window.position)} (record {record})", f"{source}:{record}"
        while True:
            try:
                value, end = decoder.raw_decode(window.text, window.position)
                break
            except json.JSONDecodeError as error:
                ended = error.msg.startswith("Unterminated string")
                if ended or error.pos >= len(window.text.rstrip()) - _CUT_MARGIN:
                    if window.more():
                        continue
                    bad = BadRow(CUT_OFF, f"record {record} is incomplete")
                    yield Row(bad, location, fallback_id, source, cut_off=True)
                    return
                # Where the next record begins is unknown, so skipping would lose the rest of the file.
                raise DataError(
                    f"{path}:{window.line(error.pos)} (record {record}): broken JSON: {error.msg} at column "
                    f"{window.column(error)}; expected an array of objects. Correct the record: the rest of an array "
                    "cannot be read past it."
                ) from None
        window.position = end
        yield Row(value, location, fallback_id, source)
