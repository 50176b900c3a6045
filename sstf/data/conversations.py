"""Reads conversations from files, the packaged sample, packages or a hub, and says what it could not use and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sstf.data.config import (
    DataConfig,
    HubSource,
    JsonlSource,
    PackageSource,
    SampleSource,
    SelfWrittenSource,
    Source,
)
from sstf.data.files import Row, expand, file_rows
from sstf.data.hub import hub_rows
from sstf.data.packages import packaged_file
from sstf.data.rows import BadRow, Item, UselessRow, parse_row
from sstf.errors import DataError
from sstf.types import Conversation

# The sample that ships with the package: conversations that the embedded target wrote.
SAMPLE = Path(__file__).parent / "samples" / "smollm2-135m-instruct.jsonl.gz"


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows: `skipped` and `repaired` count them by reason; a repaired row was kept."""

    read: int
    kept: int
    skipped: dict[str, int]
    repaired: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversationSet:
    """What was read, in the order of the source, and the report of reading it.

    `items` are conversations, except where a source of kept answers holds plain text or token ids.
    """

    items: list[Item]
    report: ReadReport

    @property
    def conversations(self) -> list[Conversation]:
        """The items that are conversations."""
        return [item for item in self.items if isinstance(item, Conversation)]


def read_conversations(config: DataConfig) -> ConversationSet:
    """Read the configured source, except `self_written`, which has to be generated.

    Raises:
        DataError: A row is broken (unless `on_bad_row` is `skip`), a file is missing, or nothing is left.
    """
    read, skipped, repaired = 0, Counter[str](), Counter[str]()
    items: list[Item] = []
    ids: set[str] = set()
    for row in _rows(config.source):
        read += 1
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            parsed = parse_row(row.value, row.fallback_id, row.source, config.answers.kind == "regenerate")
            if parsed.item.id in ids:
                raise BadRow("duplicate id", f"{parsed.item.id!r} was used by an earlier row, expected a new one")
        except BadRow as bad:
            # A dump that ends within a record lost one record; that is counted and no reason to stop.
            if config.on_bad_row == "stop" and not row.cut_off and not isinstance(bad, UselessRow):
                raise DataError(f"{row.location}: {bad}. Correct the row, or set on_bad_row=skip.") from None
            skipped[bad.reason] += 1
            continue
        if parsed.repaired is not None:
            repaired[parsed.repaired] += 1
        ids.add(parsed.item.id)
        items.append(parsed.item)
        if len(items) == config.max_conversations:
            break
    if not items:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise DataError(
            f"The {config.source.kind} source holds no usable conversation: {read} rows read"
            + (f", skipped: {reasons}." if reasons else ".")
        )
    return ConversationSet(items, ReadReport(read, len(items), dict(skipped), dict(repaired)))


def _rows(source: Source) -> Iterator[Row]:
    match source:
        case SampleSource():
            if not SAMPLE.is_file():
                raise DataError(f"The packaged sample {SAMPLE.name} is missing; install the package again.")
            yield from file_rows(SAMPLE, "sample")
        case JsonlSource(path=paths):
            for path in (paths,) if isinstance(paths, Path) else paths:
                for file in expand(path):
                    yield from file_rows(file, str(file))
        case HubSource():
            yield from hub_rows(source)
        case PackageSource(name=name):
            yield from file_rows(packaged_file(name), name)
        case SelfWrittenSource():
            raise ValueError("self-written requests are generated, see self_written.write_prompts")
