"""A published head's files: `config.json` and safetensors. What kind of head it is, is `families.py`'s to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.errors import DamagedDataError, ExportError, HeadError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Published:
    """A published head as it lies in its folder, under the names that its publisher gave."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration with the decoder layer's fields, which speculators keeps in a part of their own."""
        return {**self.config, **self.config.get("transformer_layer_config", {})}

    @property
    def speculators_type(self) -> str | None:
        """The kind of head that speculators' form names; None in other forms."""
        found: str | None = self.config.get("speculators_model_type")
        return found

    @property
    def form(self) -> str:
        """Whose form it is."""
        return "eagle" if self.speculators_type is None else "speculators"

    def is_built_as(self, *architectures: str) -> bool:
        """Whether its configuration names one of these classes."""
        return any(one in architectures for one in self.config.get("architectures") or [])

    def renamed(self, tensors: Mapping[str, Tensor]) -> Published:
        """With these tensors in place of its own."""
        return replace(self, tensors=tensors)

    def number(self, name: str) -> int:
        """An integer of its configuration.

        Raises:
            HeadError: there is none.
        """
        if type(self.fields.get(name)) is not int:
            raise HeadError(f"its config.json has {name}={self.fields.get(name)!r}, expected a number")
        return int(self.fields[name])

    @property
    def known_by(self) -> str:
        """What a reader may recognise it by, in words."""
        kind = f", speculators_model_type {self.speculators_type}" if self.speculators_type else ""
        tensors = ", ".join(sorted(self.tensors)[:3])
        return f"{self.config.get('architectures')}{kind}, with tensors such as {tensors}"


def looks_published(folder: Path) -> bool:
    """Whether there is something to read, or to say why it is not read."""
    return folder.is_dir() and any(
        path.name == "config.json" or path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir()
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A published head's `config.json`.

    Raises:
        HeadError: there is none.
        DamagedDataError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HeadError(
            f"{folder}: no head there; expected head.json and head.safetensors that `sstf train` wrote, or config.json "
            "and model.safetensors of a published head"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedDataError(f"{path}: cannot be read ({error}); copy or download it again") from None
    if not isinstance(config, dict):
        raise DamagedDataError(f"{path}: no JSON object; copy or download it again")
    return config


def open_published(folder: Path) -> Published:
    """Read both files.

    Raises:
        HeadError: one is not there, or the weights are a pickle. The folder is left for the caller to name.
        DamagedDataError: one was cut off or altered.
    """
    _refuse_pickles(folder)
    return Published(read_config(folder), _read_tensors(folder))


def _refuse_pickles(folder: Path) -> None:
    found = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if found and not any(folder.glob("*.safetensors")):
        raise HeadError(
            f"{folder}: its weights are {found[0]}, a pickle, which can run any code when it is read; take the "
            "publisher's model.safetensors, or convert the file on a machine with nothing to lose: "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedDataError(f"{index}: cannot be read; copy or download it again") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(str(name)).name  # never outside the folder
        if not path.is_file():
            raise HeadError(f"{folder}: no {path.name}; expected the weights of a published head there")
        try:
            tensors |= load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise DamagedDataError(f"{path}: cannot be read ({error}); copy or download it again") from None
    return tensors


def check_values(tensors: Mapping[str, Tensor], maps: tuple[str, ...] = ()) -> None:
    """Raises HeadError for weights, all but `maps`, that are of no float type or hold values that are not finite."""
    for name, tensor in tensors.items():
        if name not in maps and tensor.dtype not in WEIGHTS:
            raise HeadError(f"its tensor {name} is of {tensor.dtype}, expected float32, bfloat16 or float16")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HeadError(f"its tensor {name} holds values that are not finite")


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], named: str, hints: Mapping[str, str]
) -> None:
    """A published head has these tensors and no others.

    Args:
        tensors: that were found.
        expected: shapes by name.
        named: the method.
        hints: for a tensor too many whose name begins so, what the configuration would have to say.

    Raises:
        HeadError: a tensor too many, too few, or of another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise HeadError(f"it lacks the tensor {name} {list(expected[name])}; copy or download it again")
        if name not in expected:
            flag = hints.get(name.split(".")[0])
            hint = f"; its config.json does not say {flag}" if flag else ""
            raise HeadError(f"it holds the tensor {name} {list(found[name])}, which no {named} head here has{hint}")
        if found[name] != expected[name]:
            raise HeadError(
                f"its tensor {name} has the shape {list(found[name])}, by its config.json and the target it would be "
                f"{list(expected[name])}"
            )


def check_exportable(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], named: str) -> None:
    """Before a head is written: it has all tensors of its method and no others, and their values are finite.

    Raises:
        ExportError: it has not.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(expected):
        wrong = sorted(name for name in found | dict(expected) if found.get(name) != expected.get(name))
        what = ", ".join(f"{name} (found {found.get(name)}, expected {expected.get(name)})" for name in wrong)
        raise ExportError(f"the head cannot be exported, its tensors are not those of {named}: {what}")
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ExportError(f"the head cannot be exported: {', '.join(broken)} holds values that are not finite")


def write_published(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(
        folder / "model.safetensors",
        save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}),
    )
    write_json_atomic(folder / "config.json", dict(config))
