"""What a method's heads are elsewhere: one `Family` a module, all of them in `families.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sstf.errors import DamagedDataError, ExportError, HeadError
from sstf.formats.files import Published, open_published
from sstf.formats.layer_ids import Engine
from sstf.formats.vocabulary_map import MAPS
from sstf.methods.checkpoint import StoredHead
from sstf.targets import FrozenHead, TargetSpec


@dataclass(frozen=True)
class Order:
    """What is to be written: a head, for an engine, to a folder; see `families.export_head` for the rest."""

    stored: StoredHead
    engine: Engine
    folder: Path
    verifier: str | None = None
    frozen: FrozenHead | None = None


@dataclass(frozen=True)
class Family:
    """The heads of one method in the forms of others.

    `write` writes what an engine of `engines` loads, reads it back, and returns what its users have to know. `claims`
    says whether a published head is of this family, `read` makes it ours. The forms for `with_target` hold tensors of
    the target. `vllm` are the keys of vLLM's speculative
    configuration that name the method; `sglang` is SGLang's `--speculative-algorithm`.
    """

    named: str  # in sentences
    engines: tuple[Engine, ...]
    write: Callable[[Order], list[str]]
    claims: Callable[[Published], bool]
    read: Callable[[Published, TargetSpec], StoredHead]
    vllm: Mapping[str, Any]
    with_target: tuple[Engine, ...] = ()
    sglang: str | None = None


def check_read_back(
    order: Order,
    read: Callable[[Published, TargetSpec], StoredHead],
    settings: Sequence[str],
    maps: Sequence[str] = MAPS,
) -> None:
    """Read an export as anybody's head: it has to be the one that it was made from.

    Args:
        order: that was written.
        read: of its family.
        settings: of the method, which have to be the same; None is compared as it is read.
        maps: tensors that are no weights, which are written as they are.

    Raises:
        ExportError: it is another one.
    """
    stored = order.stored
    try:
        back = read(open_published(order.folder), stored.target)
    except (HeadError, DamagedDataError) as error:
        raise ExportError(f"{order.folder}: what was written cannot be read back ({error}); please report it") from None
    other = [
        name
        for name, tensor in stored.tensors.items()
        if name not in back.tensors
        or not torch.equal(back.tensors[name], tensor if name in maps else tensor.bfloat16().float())
    ]
    other += sorted(back.tensors.keys() - stored.tensors.keys())
    theirs, ours = back.config.model_dump(), stored.config.model_dump()
    other += [name for name in settings if theirs[name] != ours[name]]
    if back.layers != stored.layers:
        other.append(f"the layers, {list(back.layers)} in place of {list(stored.layers)}")
    if other:
        raise ExportError(f"{order.folder}: reads differently from the head in {', '.join(other)}; please report it")
