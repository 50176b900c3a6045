"""The feature store: safetensors shards beside a JSON manifest with a checksum for every file.

    <folder>/manifest.json          what the store was made from, counts, every shard with its size and sha256
    <folder>/frozen.safetensors     frozen parts of the target (`targets/frozen_head.py`)
    <folder>/shard-00000.safetensors
    <folder>/shard-00000.json       written last, so a shard without it is unfinished and is made again

Both kinds of JSON begin with their own checksum (`sealed`). A shard holds the tensors of whole conversations (`record`)
as `<conversation>.<name>`, counted from 0 in each shard; under zstd each is one frame of bytes. A conversation is read
by itself, so any order costs the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sstf.data.atomic import write_bytes_atomic
from sstf.errors import DamagedDataError
from sstf.features.codecs import CODECS, CodecName, CompressionName, Part, compress, decompress
from sstf.features.dataset import collate
from sstf.features.record import Features, Record
from sstf.features.sealed import NotSealedError, read_sealed, write_sealed
from sstf.features.spec import TeacherSignal
from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch

FORMAT = 2
LAYER_CONVENTION = "0-based decoder layer outputs"
EngineName = Literal["transformers", "vllm"]
MANIFEST = "manifest.json"
FROZEN = "frozen.safetensors"

_SIGNAL: TypeAdapter[TeacherSignal] = TypeAdapter(TeacherSignal)


@dataclass(frozen=True)
class Origin:
    """All that decides what a store holds. Every shard carries it, so that shards of two origins never mix."""

    target: TargetSpec
    layers: tuple[int, ...]
    codec: CodecName
    compression: CompressionName
    teacher: TeacherSignal
    chat_template: str  # sha256
    data: str  # sha256 of the conversations' names, tokens and masks
    shard_tokens: int
    batch_tokens: int  # decides which conversations meet in a batch, hence the last bits
    engine: EngineName = "transformers"  # vLLM's kernels round otherwise

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "target": self.target.to_json(),
            "layers": list(self.layers),
            "layer_convention": LAYER_CONVENTION,
            "codec": self.codec,
            "compression": self.compression,
            "teacher": self.teacher.model_dump(mode="json"),
            "chat_template": self.chat_template,
            "data": self.data,
            "shard_tokens": self.shard_tokens,
            "batch_tokens": self.batch_tokens,
            "engine": self.engine,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Origin:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is not what `to_json` returned.
        """
        if fields["layer_convention"] != LAYER_CONVENTION:
            raise ValueError(f"layers are {fields['layer_convention']!r}, expected {LAYER_CONVENTION!r}")
        if fields["codec"] not in CODECS or fields["compression"] not in ("none", "zstd"):
            raise ValueError(f"codec {fields['codec']!r} with compression {fields['compression']!r} is not known")
        return Origin(
            TargetSpec.from_json(fields["target"]),
            tuple(fields["layers"]),
            fields["codec"],
            fields["compression"],
            _SIGNAL.validate_python(fields["teacher"]),
            fields["chat_template"],
            fields["data"],
            fields["shard_tokens"],
            fields["batch_tokens"],
            fields["engine"],
        )

    def summary(self) -> dict[str, Any]:
        """The same in short, for the shards: the target by its fingerprint."""
        return {**self.to_json(), "target": f"{self.target.name} ({self.target.fingerprint})"}

    def record(self) -> Record:
        """The form of this store's conversations."""
        hidden = self.target.hidden_size
        return Record(hidden * len(self.layers), hidden, self.target.vocab_size, self.codec, self.teacher)


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its conversations in order, and what its bytes must hash to."""

    file: str
    sha256: str
    size: int
    ids: list[str]
    lengths: list[int]
    trained: list[int]


def shard_stem(index: int) -> str:
    """File name of shard `index`, without its suffix."""
    return f"shard-{index:05d}"


def write_shard(folder: Path, index: int, ids: list[str], rows: Sequence[Features], origin: Origin) -> ShardInfo:
    """Write one shard and then, as its mark of completion, its description."""
    record = origin.record()
    tensors = {
        f"{i}.{name}": compress(tensor) if origin.compression == "zstd" else tensor
        for i, row in enumerate(rows)
        for name, tensor in record.encode(row).items()
    }
    data = save(tensors)
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
    write_sealed(folder / f"{stem}.json", {"made_from": origin.summary(), **asdict(info)})
    return info


def finished_shard(folder: Path, index: int, origin: Origin) -> ShardInfo | None:
    """The description of shard `index` if an earlier run completed it, else None.

    Raises:
        DamagedDataError: the description was altered, or the shard was made from something else.
    """
    description = folder / f"{shard_stem(index)}.json"
    if not description.exists():
        return None
    info, made_from = read_description(description)
    wanted = origin.summary()
    for key in wanted:
        if made_from.get(key) != wanted[key]:
            raise DamagedDataError(
                f"{folder / info.file} was made with {key} {made_from.get(key)}, this run has {wanted[key]}; delete "
                f"{folder} and run `sstf extract` again"
            )
    file = folder / info.file
    return info if file.exists() and file.stat().st_size == info.size else None


def read_description(path: Path) -> tuple[ShardInfo, dict[str, Any]]:
    """A shard's description, and the summary of what it was made from.

    Raises:
        DamagedDataError: the file is missing, was altered or is not a shard's description.
    """
    content = _read(path)
    try:
        made_from: dict[str, Any] = content.pop("made_from")
        return ShardInfo(**content), made_from
    except (KeyError, TypeError) as error:
        raise DamagedDataError(f"{path}: not a shard's description ({error}); {again(path)}") from None


def write_manifest(folder: Path, origin: Origin, shards: list[ShardInfo]) -> None:
    """Close the store: from here on it can be read."""
    write_sealed(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "made_from": origin.to_json(),
            "frozen_sha256": sha256_of(folder / FROZEN),
            "tokens": sum(sum(shard.lengths) for shard in shards),
            "trained_tokens": sum(sum(shard.trained) for shard in shards),
            "shards": [asdict(shard) for shard in shards],
        },
    )


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    origin: Origin
    frozen_sha256: str
    tokens: int
    trained_tokens: int
    shards: list[ShardInfo] = field(default_factory=list)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished store.

    Raises:
        DamagedDataError: it is missing, was altered, or is of another format.
    """
    path = folder / MANIFEST
    content = _read(path)
    try:
        if content["format"] != FORMAT:
            raise DamagedDataError(f"{path}: format {content['format']}, this version reads {FORMAT}; {again(folder)}")
        return Manifest(
            Origin.from_json(content["made_from"]),
            content["frozen_sha256"],
            content["tokens"],
            content["trained_tokens"],
            [ShardInfo(**shard) for shard in content["shards"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedDataError(f"{path}: unreadable manifest ({error!r}); {again(folder)}") from None


class FeatureStore:
    """Random access to the conversations of a finished store, a `FeatureSource`.

    A shard's size is checked when the store is opened and its checksum before its first row is used, so damage is
    found before anything is trained on it. Threads may share a store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        self.origin = manifest.origin
        self.target, self.layers = manifest.origin.target, manifest.origin.layers
        self.tokens, self.trained_tokens = manifest.tokens, manifest.trained_tokens
        self.shards = manifest.shards
        self._frozen_sha256 = manifest.frozen_sha256
        for shard in self.shards:
            check_size(folder / shard.file, shard)
        self._where = [(shard, i) for shard, info in enumerate(self.shards) for i in range(len(info.ids))]
        self.ids = [name for shard in self.shards for name in shard.ids]
        self.lengths = [length for shard in self.shards for length in shard.lengths]
        self.trained = [count for shard in self.shards for count in shard.trained]
        self._record = self.origin.record()
        self._open: dict[int, Shard] = {}
        self._opening = Lock()

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.folder)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Features:
        shard, i = self._where[index]
        return self._shard(shard).conversation(i, self._record)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """Aligned rows of some conversations, one after the other; see `dataset`."""
        return collate([self[i] for i in indices])

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource.made_from`; `shards` is the SHA-256 of the shards' own."""
        sums = "".join(shard.sha256 for shard in self.shards)
        return {"kind": "store", **self.origin.summary(), "shards": hashlib.sha256(sums.encode()).hexdigest()}

    def place(self, index: int) -> str:
        """Shard, place in it and name of a conversation."""
        shard, i = self._where[index]
        return f"conversation {i} of {self.folder / self.shards[shard].file} ({self.ids[index]})"

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids [seq] int64 and loss mask [seq] bool of one conversation, without its hidden states."""
        shard, i = self._where[index]
        return self._shard(shard).tokens(i, self._record)

    def frozen_head(self) -> FrozenHead:
        """The frozen parts of the target that the store was made with."""
        path = self.folder / FROZEN
        if not path.exists() or sha256_of(path) != self._frozen_sha256:
            raise DamagedDataError(f"{path} is missing or altered; {again(path)}")
        return FrozenHead.load(path)

    def _shard(self, index: int) -> Shard:
        with self._opening:
            if index not in self._open:
                self._open[index] = Shard(self.folder, self.shards[index], self.origin.compression)
            return self._open[index]


class Shard:
    """One shard, open for reading."""

    def __init__(self, folder: Path, info: ShardInfo, compression: CompressionName) -> None:
        """Check every byte.

        Raises:
            DamagedDataError: the file is missing, was cut off or altered.
        """
        self.path, self.info, self.zstd = folder / info.file, info, compression == "zstd"
        check_size(self.path, info)
        if sha256_of(self.path) != info.sha256:
            raise DamagedDataError(f"{self.path}: its checksum differs from the manifest's; {again(self.path)}")
        self._file = self._map()

    def conversation(self, i: int, record: Record) -> Features:
        """All rows of the shard's conversation `i`.

        Raises:
            DamagedDataError: the shard is not what `record` and the manifest say.
        """
        # Tensors of a file are pages of it, resident until the file is closed: with one mapping for good, training
        # would come to hold the whole store. This one goes with the tensors of the conversation.
        file = self._map()
        return record.decode(self.info.lengths[i], lambda name, part, rows: self._read(file, f"{i}.{name}", part, rows))

    def tokens(self, i: int, record: Record) -> tuple[Tensor, Tensor]:
        """Token ids and loss mask of conversation `i`."""
        return record.decode_tokens(
            self.info.lengths[i], lambda name, part, rows: self._read(self._file, f"{i}.{name}", part, rows)
        )

    def names(self) -> set[str]:
        """All tensors in the file."""
        return set(self._file.keys())

    def _map(self) -> Any:
        try:
            return safe_open(self.path, framework="pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error

    def _read(self, file: Any, name: str, part: Part, rows: int) -> Tensor:
        shape = (rows, *part.row)
        try:
            tensor: Tensor = file.get_tensor(name)
            if self.zstd:
                return decompress(tensor, part.dtype, shape)
        except (SafetensorError, ValueError) as error:
            raise self._unreadable(error) from error
        if (tensor.dtype, tuple(tensor.shape)) != (part.dtype, shape):
            raise self._unreadable(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the manifest says {part.dtype} {list(shape)}"
            )
        return tensor

    def _unreadable(self, why: object) -> DamagedDataError:
        return DamagedDataError(f"{self.path}: cannot be read ({why}); {again(self.path)}")


def check_size(file: Path, info: ShardInfo) -> None:
    """Raise DamagedDataError where a shard is missing or has another size than it had."""
    found = file.stat().st_size if file.exists() else None
    if found != info.size:
        what = "is missing" if found is None else f"has {found} bytes, expected {info.size}"
        raise DamagedDataError(f"{file} {what}; {again(file)}")


def again(path: Path) -> str:
    """How to repair a damaged file, or a whole folder."""
    if path.suffix and path.name != MANIFEST:
        # Without its manifest a store counts as unfinished: extraction makes what is missing and keeps the rest.
        return f"delete {path.name} and the manifest.json beside it, and run `sstf extract` again"
    return f"delete {path} and run `sstf extract` again"


def sha256_of(path: Path) -> str:
    """Checksum of a file, read a piece at a time."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except FileNotFoundError:
        raise DamagedDataError(f"{path} is missing: the features are not finished; run `sstf extract`") from None
    except NotSealedError as error:
        if _is_old(path):
            raise DamagedDataError(
                f"{path}: format 1, this version reads {FORMAT}; delete {path.parent} and run `sstf extract` again"
            ) from None
        raise DamagedDataError(f"{path} was altered or cut off ({error}); {again(path)}") from None
    except ValueError as error:
        raise DamagedDataError(f"{path} was altered or cut off ({error}); {again(path)}") from None


def _is_old(path: Path) -> bool:
    """Whether it is a manifest or a shard's description of format 1, which had no checksums of their own."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and (content.get("format") == 1 or {"file", "ids", "lengths"} <= content.keys())
