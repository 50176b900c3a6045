"""Ways to spoil a head's files so that they still read well: every checksum is made anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from sstf.data.progress import NoProgress
from sstf.doctor import Check, check_head
from sstf.targets import Target


def alter_tensors(head: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A head of ours with other tensors."""
    tensors = load_file(head / "head.safetensors")
    change(tensors)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (head / "head.safetensors").write_bytes(data)
    alter_json(head / "head.json", lambda fields: fields.update(sha256=hashlib.sha256(data).hexdigest()))
    return head


def alter_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def name_layers(head: Path, layers: list[int]) -> Path:
    """The same tensors, said to read other layers."""

    def change(fields: dict[str, Any]) -> None:
        fields["layers"] = fields["method"]["layers"] = layers

    alter_json(head / "head.json", change)
    return head


def verdicts(head: Path, target: Target) -> list[Check]:
    return check_head(head, target, NoProgress())


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.verdict == "fail"]


def not_passed(checks: list[Check]) -> dict[str, str]:
    return {check.name: f"{check.verdict}: {check.measured}" for check in checks if check.verdict != "pass"}
