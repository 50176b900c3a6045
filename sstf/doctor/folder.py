"""A head's files as they lie, before anything is built from them: what loading would refuse or repair is still there.

Own heads are a `head.json`, published ones a `config.json` beside safetensors. Which of their tensors is which is left
to `formats`; doctor looks here at names that all forms share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sstf.errors import DamagedDataError, HeadError
from sstf.methods.checkpoint import read_head

# Where published forms write the target's layers that are read, each counted in its own way.
LAYER_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "layer_ids", "target_layer_ids")


@dataclass(frozen=True)
class HeadFiles:
    """`own` heads were written by this project; `fields` is the JSON beside the tensors."""

    own: bool
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name, whatever module it is said to be in."""
        found = (tensor for key, tensor in self.tensors.items() if key == name or key.endswith(f".{name}"))
        return next(found, None)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, see `tensor`."""
        return self.tensor(name) is not None

    def layer_ids(self) -> list[int] | None:
        """The layers named in the files, in whatever convention; None where none are."""
        if self.own:
            return [int(layer) for layer in self.fields["layers"]]
        named = (value for key, value in _entries(self.fields) if key in LAYER_KEYS and isinstance(value, list))
        return next(([int(layer) for layer in ids] for ids in named), None)

    def flags(self, name: str) -> list[bool]:
        """Every value that a flag has in the files."""
        return [value for key, value in _entries(self.fields) if key == name and isinstance(value, bool)]


def read_files(folder: Path) -> HeadFiles:
    """Read them.

    Raises:
        HeadError: no head there, or its tensors are not safetensors.
        DamagedDataError: a file was cut off or altered.
    """
    own = (folder / "head.json").is_file()
    description = folder / ("head.json" if own else "config.json")
    if own:
        tensors: Mapping[str, Tensor] = read_head(folder).tensors  # under a checksum
    else:
        tensors = _published(folder)
    try:
        fields = json.loads(description.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedDataError(f"{description}: cannot be read ({error}); copy the head again") from None
    if not isinstance(fields, dict):
        raise DamagedDataError(f"{description}: holds no JSON object; copy the head again")
    return HeadFiles(own, fields, tensors)


def _published(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise HeadError(f"{folder}: no safetensors file there; expected a head's folder")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise DamagedDataError(f"{file}: cannot be read ({error}); copy the head again") from None
    return tensors


def _entries(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys and values, those of inner objects behind the outer ones."""
    yield from fields.items()
    for value in fields.values():
        if isinstance(value, dict):
            yield from _entries(value)
