"""What the real libraries wrote, read back: {(step, name): value}, and a fault for what is there twice."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Figures = dict[tuple[int, str], float]


def once(rows: Iterable[tuple[int, str, float]]) -> Figures:
    found: Figures = {}
    for step, name, value in rows:
        assert (step, name) not in found, f"{name} of step {step} is there twice"
        found[step, name] = value
    return found


def in_jsonl(folder: Path) -> Figures:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return once((row["step"], name, value) for row in lines for name, value in row.items() if name != "step")


def in_tensorboard(folder: Path) -> Figures:
    """As TensorBoard shows it: without the steps that a later file purges."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return once((event.step, name, event.value) for name in names for event in events.Scalars(name))


def in_trackio(database: Path, run: str) -> Figures:
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", (run,)).fetchall()
    connection.close()
    return once((step, name, value) for step, text in rows for name, value in json.loads(text).items())


def in_wandb(folder: Path) -> Figures:
    """All starts of a run, as `wandb sync` would join them."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for record in _wandb_files(folder):
        for data in _whole_records(record):
            message: Any = wandb_internal_pb2.Record.FromString(data)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in message.history.item}
            rows += [(int(items["_step"]), k, json.loads(v)) for k, v in items.items() if k[0] != "_"]
    return once(rows)


def wandb_ids(folder: Path) -> set[str]:
    return {file.stem.removeprefix("run-") for file in _wandb_files(folder)}


def _wandb_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def _whole_records(file: Path) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB of (crc, length, type, data)."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):  # not written yet
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
