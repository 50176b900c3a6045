"""Reads conversations from files, the packaged sample, or a data set hub, and says what it could not use and why."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstf.data.config import DataConfig, HubSource, JsonlSource, SampleSource, SelfWrittenSource
from sstf.data.hub import hub_rows
from sstf.data.rows import BadRow, parse_row
from sstf.errors import DataError
from sstf.types import Conversation

# The sample that ships with the package: conversations that the embedded target wrote.
SAMPLE = Path(__file__).parent / "samples" / "smollm2-135m-instruct.jsonl.gz"
CUT_OFF = "cut off at the end of the file"
# Distance from the end of a cut-off file at which a decoding error may be reported: half a `\uXXXX` or `false`.
_CUT_MARGIN = 6


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows; `skipped` counts them by reason."""

    read: int
    kept: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class ConversationSet:
    """Conversations in the order of their source, and the report of reading them."""

    conversations: list[Conversation]
    report: ReadReport


@dataclass(frozen=True)
class _Row:
    """A decoded row, or why it could not be decoded, and where it came from."""

    value: Any | BadRow
    location: str  # for messages: file:line
    fallback_id: str
    source: str
    cut_off: bool = False


def read_conversations(config: DataConfig) -> ConversationSet:
    """Read the configured source, except `self_written`, which has to be generated.

    Raises:
        DataError: A row is broken (unless `on_bad_row` is `skip`), a file is missing, or nothing is left.
    """
    read, skipped = 0, Counter[str]()
    conversations: list[Conversation] = []
    ids: set[str] = set()
    for row in _rows(config.source):
        read += 1
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            conversation = parse_row(row.value, row.fallback_id, row.source, config.answers.kind == "keep")
            if conversation.id in ids:
                raise BadRow("duplicate id", f"{conversation.id!r} was used by an earlier row, expected a new one")
        except BadRow as bad:
            # A dump that ends within a record lost one record; that is counted and no reason to stop.
            if config.on_bad_row == "stop" and not row.cut_off:
                raise DataError(f"{row.location}: {bad}. Correct the row, or set on_bad_row=skip.") from None
            skipped[bad.reason] += 1
            continue
        ids.add(conversation.id)
        conversations.append(conversation)
        if len(conversations) == config.max_conversations:
            break
    if not conversations:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise DataError(
            f"The {config.source.kind} source holds no usable conversation: {read} rows read"
            + (f", skipped: {reasons}." if reasons else ".")
        )
    return ConversationSet(conversations, ReadReport(read, len(conversations), dict(skipped)))


def _rows(source: SampleSource | JsonlSource | HubSource | SelfWrittenSource) -> Iterator[_Row]:
    match source:
        case SampleSource():
            if not SAMPLE.is_file():
                raise DataError(f"The packaged sample {SAMPLE.name} is missing; install the package again.")
            yield from _file_rows(SAMPLE, "sample")
        case JsonlSource(path=paths):
            for path in (paths,) if isinstance(paths, Path) else paths:
                yield from _file_rows(path, str(path))
        case HubSource():
            name = f"{source.name}/{source.split}"
            for number, value in enumerate(hub_rows(source), start=1):
                yield _Row(value, f"{name}:{number}", f"{name}:{number}", name)
        case SelfWrittenSource():
            raise ValueError("self-written requests are generated, see self_written.write_prompts")


def _file_rows(path: Path, source: str) -> Iterator[_Row]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            first = file.readline()
            while first and not first.removeprefix(codecs.BOM_UTF8).strip():
                first = file.readline()
            file.seek(0)
            if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from _array_rows(file.read(), path, source)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _Row(_decode_line(line), f"{path}:{number}", f"{source}:{number}", source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); copy or download it again.") from error
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a .jsonl or .json file, plain or .gz.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decode_line(line: bytes) -> Any | BadRow:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        return BadRow("broken text", f"byte {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(
            "broken JSON", f"{error.msg} at column {error.colno}; expected one JSON object a line, or one array of them"
        )


def _array_rows(data: bytes, path: Path, source: str) -> Iterator[_Row]:
    """One JSON array, record by record, so that a file that was cut off gives all its whole records."""
    try:
        # An incremental decoder leaves out half a character at the end in place of failing on it.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data).rstrip()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {error.start + 1} of the file is not UTF-8; convert the file.") from None
    decoder = json.JSONDecoder()
    position, line, record = text.index("[") + 1, 1, 0
    counted = 0
    while True:
        position = _skip(text, position, ", \t\r\n" if record else " \t\r\n")
        if position >= len(text) or text[position] == "]":
            return
        record += 1
        line += text.count("\n", counted, position)
        counted = position
        location, fallback_id = f"{path}:{line} (record {record})", f"{source}:{record}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string") or error.pos >= len(text) - _CUT_MARGIN:
                bad = BadRow(CUT_OFF, f"record {record} is incomplete")
                yield _Row(bad, location, fallback_id, source, cut_off=True)
                return
            # Where the next record begins is unknown, so skipping would lose the rest of the file.
            raise DataError(
                f"{path}:{error.lineno} (record {record}): broken JSON: {error.msg} at column {error.colno}; expected "
                "an array of objects. Correct the record: the rest of an array cannot be read past it."
            ) from None
        yield _Row(value, location, fallback_id, source)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
