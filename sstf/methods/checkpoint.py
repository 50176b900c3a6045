"""A trained head on disk: `head.safetensors` (the module's state dict) and `head.json` (what it is and whose).

This is the project's own form, which training, decoding and evaluation read; `export` writes what engines load.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.errors import DamagedDataError, HeadError
from sstf.features.store import LAYER_CONVENTION
from sstf.methods import MethodConfig, build_method
from sstf.methods.base import DraftMethod, TrainableMethod
from sstf.methods.block import BlockConfig
from sstf.targets import FrozenHead, Target, TargetSpec

FORMAT = 1
ROUNDING = 2.0**-7  # of a value that was stored in bfloat16, and half as much again


@dataclass(frozen=True)
class DraftHead:
    """A method and, where it has one, its module on the target's device in the target's dtype."""

    name: str
    method: DraftMethod
    module: nn.Module | None = None


def save_head(folder: Path, config: Any, module: nn.Module, target: TargetSpec, run: dict[str, Any]) -> None:
    """Write a head; `run` is free-form provenance."""
    method = build_method(config)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})
    write_bytes_atomic(folder / "head.safetensors", data)
    write_json_atomic(
        folder / "head.json",
        {
            "format": FORMAT,
            "method": config.model_dump(mode="json"),
            "layers": list(method.feature_spec(target).layers),
            "layer_convention": LAYER_CONVENTION,
            "target": target.to_json(),
            "sha256": hashlib.sha256(data).hexdigest(),
            "run": run,
        },
    )


@dataclass(frozen=True)
class StoredHead:
    """A head as it lies on disk, not yet bound to a target.

    `embeddings` [vocab, hidden] and `lm_head` [draft_vocab, hidden] are those of the target that a published checkpoint
    came with; heads use the target's.
    """

    config: Any
    tensors: dict[str, Tensor]
    layers: tuple[int, ...]
    target: TargetSpec
    run: dict[str, Any]
    embeddings: Tensor | None = None
    lm_head: Tensor | None = None


def read_head(folder: str | Path) -> StoredHead:
    """Read and check a head folder.

    Raises:
        HeadError: no head there, or one that this version does not know.
        DamagedDataError: the tensors were cut off or altered.
    """
    folder = Path(folder)
    description = folder / "head.json"
    if not description.is_file():
        raise HeadError(f"{folder}: no head.json; expected a head folder that `sstf train` wrote")
    try:
        fields = json.loads(description.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise HeadError(f"{description}: head format {fields['format']}, this version reads {FORMAT}")
        # JSON mode: lists stand for tuples
        config = TypeAdapter(MethodConfig).validate_json(json.dumps(fields["method"]))
        target = TargetSpec.from_json(fields["target"])
        layers, digest, run = tuple(fields["layers"]), fields["sha256"], fields["run"]
    except (ValueError, KeyError, TypeError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        if unknown := [str(one["loc"][-1]) for one in faults if one["type"] == "extra_forbidden"]:
            raise HeadError(
                f"{description}: its method has the setting {unknown[0]}, which this version does not know; use the "
                "version that trained it, or train it again"
            ) from None
        raise DamagedDataError(
            f"{description}: unreadable ({type(error).__name__}); train or copy the head again"
        ) from None
    try:
        data = (folder / "head.safetensors").read_bytes()
    except OSError as error:
        raise DamagedDataError(f"{folder / 'head.safetensors'}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamagedDataError(
            f"{folder / 'head.safetensors'}: altered or cut off (its checksum differs); copy it again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise DamagedDataError(f"{folder / 'head.safetensors'}: not a safetensors file ({error})") from None
    return StoredHead(config, tensors, layers, target, run)


def bind(stored: StoredHead, frozen: FrozenHead) -> nn.Module:
    """The module with the stored tensors, float32, over the frozen parts of its target.

    Raises:
        HeadError: the tensors do not fit the method, or they came with other embeddings than the target's.
    """
    check_embeddings(stored, frozen)
    method = build_method(stored.config)
    if not isinstance(method, TrainableMethod):
        raise HeadError(f"method {stored.config.kind} has no head to load")
    if "d2t" not in stored.tensors:
        raise HeadError(
            f"the stored tensors do not fit method {stored.config.kind}: there is no draft vocabulary (d2t)"
        )
    draft_tokens = stored.tensors["d2t"] + torch.arange(len(stored.tensors["d2t"]))
    module = method.build_head(stored.target, frozen, draft_tokens.to(frozen.embeddings.device))
    try:
        module.load_state_dict(stored.tensors, strict=True)
    except RuntimeError as error:
        raise HeadError(
            f"the stored tensors do not fit method {stored.config.kind}: {str(error).splitlines()[-1].strip()}"
        ) from None
    if isinstance(stored.config, BlockConfig) and stored.config.mask_token_id is not None:
        found = int(stored.tensors["mask_token"])
        if found != stored.config.mask_token_id:
            raise HeadError(
                f"its mask_token is {found}, its settings say method.mask_token_id={stored.config.mask_token_id}; it "
                "drafts well with the one that it was trained with alone, so take the files as they were written"
            )
    return module


def check_embeddings(stored: StoredHead, frozen: FrozenHead) -> None:
    """Whether the embeddings, and the rows of lm_head, that a head came with are the target's, but for rounding.

    Raises:
        HeadError: they are not.
    """
    if stored.embeddings is not None:
        _check_rows("embeddings", stored.embeddings, frozen.embeddings, stored.target)
    if stored.lm_head is not None:
        ids = stored.tensors["d2t"] + torch.arange(len(stored.tensors["d2t"]))
        _check_rows("an lm_head", stored.lm_head, frozen.lm_head[ids.to(frozen.lm_head.device)], stored.target)


def _check_rows(what: str, theirs: Tensor, ours: Tensor, target: TargetSpec) -> None:
    if theirs.shape != ours.shape:
        raise HeadError(f"the head came with {what} of shape {list(theirs.shape)}, the target's is {list(ours.shape)}")
    other = sum(
        int(((a.float() - b.float().cpu()).abs() > ROUNDING * b.float().cpu().abs() + 1e-6).any(-1).sum())
        for a, b in zip(theirs.split(8192), ours.split(8192), strict=True)
    )
    if other:
        raise HeadError(
            f"the head came with {what} of its own: {other:,} of {len(ours):,} tokens have others than in target "
            f"{target.name}; heads here use the target's, so name the target that it was trained for, or train it "
            f"further elsewhere without {what} of its own"
        )


def load_head(path: str | Path, target: Target) -> DraftHead:
    """Load a head of ours for decoding with `target`.

    Raises:
        HeadError: no head there, or it was trained for another target.
        DamagedDataError: the head was cut off or altered.
    """
    return for_decoding(read_head(path), target, str(path))


def for_decoding(stored: StoredHead, target: Target, name: str) -> DraftHead:
    """A head that was read, on the device and in the dtype of the target that it is for.

    Raises:
        HeadError: it was trained for another target, or see `bind`.
    """
    if stored.target.fingerprint != target.spec.fingerprint:
        same_shape = (
            stored.target.hidden_size == target.spec.hidden_size and stored.target.vocab_size == target.spec.vocab_size
        )
        hint = "the same shape but other weights or another dtype" if same_shape else "another shape"
        raise HeadError(
            f"{name}: the head was trained for target {stored.target.name} ({stored.target.dtype}, fingerprint "
            f"{stored.target.fingerprint}), not for {target.spec.name} ({target.spec.dtype}, "
            f"{target.spec.fingerprint}), which has {hint}; load that target, or train a head for this one"
        )
    module = bind(stored, target.frozen_head).to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)
    return DraftHead(name, build_method(stored.config), module)
