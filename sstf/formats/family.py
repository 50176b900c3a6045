"""What a method's heads are elsewhere: one `Family` a module, all of them in `families.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstf.formats.files import Published
from sstf.formats.layer_ids import Engine
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
