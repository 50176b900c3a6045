"""The one place that knows which method's heads have which forms: export, import and launch lines go through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from sstf.config_loading import Section
from sstf.errors import ExportError, HeadError
from sstf.formats import block, dspark, eagle, eagle3, medusa, p_eagle
from sstf.formats.family import Family, Order
from sstf.formats.files import open_published
from sstf.formats.layer_ids import Engine
from sstf.methods.checkpoint import DraftHead, StoredHead, for_decoding, read_head
from sstf.targets import FrozenHead, Target, TargetSpec

FAMILIES: dict[str, Family] = {
    "dflash": block.DFLASH,
    "dspark": dspark.FAMILY,
    "eagle": eagle.FAMILY,
    "eagle3": eagle3.FAMILY,
    "medusa": medusa.FAMILY,
    "p_eagle": p_eagle.FAMILY,
}


class ExportConfig(Section):
    """Which engines to write for, one folder each; None: every engine that knows the method."""

    engines: tuple[Engine, ...] | None = Field(default=None, min_length=1)

    def chosen(self, kind: str) -> tuple[Engine, ...]:
        """The engines that a head of a method is written for."""
        return engines_of(kind) if self.engines is None else self.engines


def engines_of(kind: str) -> tuple[Engine, ...]:
    """The engines that know a method."""
    return FAMILIES[kind].engines if kind in FAMILIES else ()


def export_head(
    stored: StoredHead, engine: Engine, folder: Path, verifier: str | None = None, frozen: FrozenHead | None = None
) -> list[str]:
    """Write `model.safetensors` (bf16) and `config.json` to `folder`, and read them back.

    Args:
        stored: a head of ours, or a published one that was read.
        engine: what is to load it.
        folder: is made, or written over.
        verifier: name of the target as users load it, which speculators' form holds; the head's own name of it, where
            that is one of a hub, if not given.
        frozen: of the target; some forms hold its embeddings or its lm_head.

    Returns:
        Sentences: what the engine needs for this head, and what is untested.

    Raises:
        ExportError: the engine does not know the method, the head's tensors are not those that the engine's model has,
            no version of the engine runs it, or what was written reads differently.
    """
    kind = stored.config.kind
    knowing = engines_of(kind)
    if engine not in knowing:
        others = f"export it for {' or '.join(knowing)}" if knowing else "no engine here does, so decode with sstf"
        raise ExportError(f"{engine} does not know this head's method, {kind}; {others}")
    return FAMILIES[kind].write(Order(stored, engine, folder, verifier, frozen))


def needs_target(kind: str, engine: Engine) -> bool:
    """Whether the form for an engine holds tensors of the target, see `export_head`."""
    return kind in FAMILIES and engine in FAMILIES[kind].with_target


def speculative_config(kind: str, head: str, depth: int) -> dict[str, Any]:
    """vLLM's `--speculative-config` for a head that was exported for it.

    Args:
        kind: of the method.
        head: folder of the export.
        depth: draft tokens a pass.

    Raises:
        ExportError: vLLM does not know the method.
    """
    if "vllm" not in engines_of(kind):
        raise ExportError(f"vLLM does not know method {kind}")
    return {**FAMILIES[kind].vllm, "model": head, "num_speculative_tokens": depth}


def sglang_algorithm(kind: str) -> str | None:
    """SGLang's `--speculative-algorithm` for a method; None where it knows none."""
    return FAMILIES[kind].sglang if kind in FAMILIES else None


def read_any(folder: str | Path, target: TargetSpec) -> StoredHead:
    """Read a head in any form.

    Args:
        folder: of a head of ours, or of a published one.
        target: that a published head is to draft for, which it does not describe. A head of ours has its own.

    Raises:
        HeadError: no head there, one that cannot be read safely or used here, or one for a target of another shape.
        DamagedDataError: a file was cut off or altered.
    """
    folder = Path(folder)
    if (folder / "head.json").is_file():
        return read_head(folder)
    head = open_published(folder)
    for family in FAMILIES.values():
        if family.claims(head):
            try:
                return family.read(head, target)
            except HeadError as error:
                raise HeadError(f"{folder}: {error}") from None
    known = ", ".join(family.named for family in FAMILIES.values())
    raise HeadError(f"{folder}: it is no head of a kind known here ({head.known_by}); known are {known}")


def load_any(folder: str | Path, target: Target) -> DraftHead:
    """Load a head in any form for decoding with `target`.

    Raises:
        HeadError: as `read_any`; or the head was trained for another target.
        DamagedDataError: a file was cut off or altered.
    """
    return for_decoding(read_any(folder, target.spec), target, str(folder))


ENGINES: tuple[Engine, ...] = get_args(Engine)
