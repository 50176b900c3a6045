"""The feature store: safetensors shards beside a JSON manifest with a checksum for every file.

    <folder>/manifest.json          target, layers, counts, and every shard with its size and sha256
    <folder>/frozen.safetensors     frozen parts of the target (`targets/frozen_head.py`)
    <folder>/shard-00000.safetensors
    <folder>/shard-00000.json       written last, so a shard without it is unfinished and is made again

A shard holds whole conversations, one after the other, with these rows per token:
`features` bf16 [taps], `hidden` bf16 [hidden] (after the final norm), `teacher_token` int32 and `teacher_lse` float32
(argmax and log-sum-exp of the target's logits; only where the next token is trained, else -1 and 0),
`input_ids` int32, `loss_mask` uint8.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.errors import DamagedDataError
from sstf.targets import FrozenHead, TargetSpec

FORMAT = 1
LAYER_CONVENTION = "0-based decoder layer outputs"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: where its conversations lie and what its bytes must hash to."""

    file: str
    sha256: str
    size: int
    ids: list[str]
    lengths: list[int]
    trained: list[int]


@dataclass(frozen=True)
class Features:
    """Stored rows of one conversation, `seq` tokens. A store hands out views of its files: copy before writing."""

    features: Tensor  # [seq, taps]
    hidden: Tensor  # [seq, hidden]
    teacher_token: Tensor  # [seq] int64
    teacher_lse: Tensor  # [seq] float32
    input_ids: Tensor  # [seq] int64
    loss_mask: Tensor  # [seq] bool


def shard_stem(index: int) -> str:
    """File name of shard `index`, without its suffix."""
    return f"shard-{index:05d}"


def write_shard(folder: Path, index: int, ids: list[str], rows: list[Features]) -> ShardInfo:
    """Write one shard and then, as its mark of completion, its description."""
    tensors = {
        "features": torch.cat([row.features for row in rows]).to(torch.bfloat16),
        "hidden": torch.cat([row.hidden for row in rows]).to(torch.bfloat16),
        "teacher_token": torch.cat([row.teacher_token for row in rows]).to(torch.int32),
        "teacher_lse": torch.cat([row.teacher_lse for row in rows]).to(torch.float32),
        "input_ids": torch.cat([row.input_ids for row in rows]).to(torch.int32),
        "loss_mask": torch.cat([row.loss_mask for row in rows]).to(torch.uint8),
    }
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    stem = shard_stem(index)
    info = ShardInfo(
        file=f"{stem}.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        ids=ids,
        lengths=[len(row.input_ids) for row in rows],
        trained=[int(row.loss_mask.sum()) for row in rows],
    )
    write_bytes_atomic(folder / info.file, data)
    write_json_atomic(folder / f"{stem}.json", asdict(info))
    return info


def finished_shard(folder: Path, index: int) -> ShardInfo | None:
    """The description of shard `index` if an earlier run completed it, else None."""
    description = folder / f"{shard_stem(index)}.json"
    if not description.exists():
        return None
    try:
        info = ShardInfo(**_read_json(description))
    except TypeError as error:
        raise DamagedDataError(f"{description}: not a shard's description ({error}); {_again(description)}") from None
    file = folder / info.file
    return info if file.exists() and file.stat().st_size == info.size else None


def write_manifest(folder: Path, target: TargetSpec, layers: tuple[int, ...], shards: list[ShardInfo]) -> None:
    """Close the store: from here on it can be read."""
    write_json_atomic(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "target": target.to_json(),
            "layers": list(layers),
            "layer_convention": LAYER_CONVENTION,
            "frozen_sha256": _sha256(folder / "frozen.safetensors"),
            "tokens": sum(sum(shard.lengths) for shard in shards),
            "trained_tokens": sum(sum(shard.trained) for shard in shards),
            "shards": [asdict(shard) for shard in shards],
        },
    )


class FeatureStore:
    """Random access to the conversations of a finished store.

    A shard's size is checked when the store is opened and its checksum before its first row is used, so damage is
    found before anything is trained on it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_json(folder / "manifest.json")
        try:
            if manifest["format"] != FORMAT:
                raise DamagedDataError(
                    f"{folder / 'manifest.json'}: format {manifest['format']}, this version reads {FORMAT}; "
                    + _again(folder)
                )
            self.target = TargetSpec.from_json(manifest["target"])
            self.layers: tuple[int, ...] = tuple(manifest["layers"])
            self.tokens: int = manifest["tokens"]
            self.trained_tokens: int = manifest["trained_tokens"]
            self.shards = [ShardInfo(**shard) for shard in manifest["shards"]]
            self._frozen_sha256: str = manifest["frozen_sha256"]
        except (KeyError, TypeError) as error:
            raise DamagedDataError(
                f"{folder / 'manifest.json'}: unreadable manifest ({error!r}); {_again(folder)}"
            ) from None
        for shard in self.shards:
            file = folder / shard.file
            found = file.stat().st_size if file.exists() else None
            if found != shard.size:
                what = "is missing" if found is None else f"has {found} bytes, expected {shard.size}"
                raise DamagedDataError(f"{file} {what}; {_again(file)}")
        self._where = [
            (shard, start)
            for shard, info in enumerate(self.shards)
            for start in torch.tensor([0, *info.lengths[:-1]]).cumsum(0).tolist()
        ]
        self.ids = [name for shard in self.shards for name in shard.ids]
        self.lengths = [length for shard in self.shards for length in shard.lengths]
        self.trained = [count for shard in self.shards for count in shard.trained]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Features:
        shard, start = self._where[index]
        file = self._shard(shard)
        end = start + self.lengths[index]

        def rows(name: str) -> Tensor:
            tensor: Tensor = file.get_slice(name)[start:end]
            return tensor

        return Features(
            rows("features"),
            rows("hidden"),
            rows("teacher_token").long(),
            rows("teacher_lse"),
            rows("input_ids").long(),
            rows("loss_mask").bool(),
        )

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids and loss mask of one conversation, without its hidden states."""
        shard, start = self._where[index]
        file, end = self._shard(shard), start + self.lengths[index]
        return file.get_slice("input_ids")[start:end].long(), file.get_slice("loss_mask")[start:end].bool()

    def frozen_head(self) -> FrozenHead:
        """The frozen parts of the target that the store was made with."""
        path = self.folder / "frozen.safetensors"
        if not path.exists() or _sha256(path) != self._frozen_sha256:
            raise DamagedDataError(f"{path} is missing or altered; {_again(path)}")
        return FrozenHead.load(path)

    def _shard(self, index: int) -> Any:
        if index not in self._open:
            info = self.shards[index]
            path = self.folder / info.file
            if _sha256(path) != info.sha256:
                raise DamagedDataError(f"{path}: its checksum differs from the manifest's; {_again(path)}")
            try:
                self._open[index] = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise DamagedDataError(f"{path}: cannot be read ({error}); {_again(path)}") from error
            rows = self._open[index].get_slice("input_ids").get_shape()[0]
            if rows != sum(info.lengths):
                raise DamagedDataError(
                    f"{self.folder / 'manifest.json'}: gives {info.file} {sum(info.lengths)} tokens, it holds {rows}; "
                    + _again(self.folder)
                )
        return self._open[index]


def _again(path: Path) -> str:
    if path.suffix and path.name != "manifest.json":
        # Without its manifest a store counts as unfinished: extraction makes what is missing and keeps the rest.
        return f"delete {path.name} and the manifest.json beside it, and run `sstf extract` again"
    return f"delete {path} and run `sstf extract` again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        raise DamagedDataError(f"{path} is missing: the features are not finished; run `sstf extract`") from None
    except ValueError as error:
        raise DamagedDataError(f"{path}: not valid JSON ({error}); {_again(path)}") from None
