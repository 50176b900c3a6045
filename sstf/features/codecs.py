"""How hidden states are written down: rows of numbers to tensors of a codec and back, and tensors to zstd and back.

| codec | values | scale | bytes a value |
|---|---|---|---|
| `bf16` | bfloat16 | none | 2 |
| `int8` | round(x / scale), -127 .. 127 | max of the block / 127 | 1 + 2/64 |
| `fp8` | float8 e4m3fn of x / scale | max of the block / 448 | 1 + 2/64 |

A block is 64 neighbouring channels of one token; a last, narrower one takes the rest. Scales belong to blocks since a
few channels of a target's middle layers are a hundred times larger than the others: with a scale a token they would
round the others away. Scales are bfloat16, which has the range of float32. Powers of two (one byte, as in the MX
formats) would save 1.5 % and were measured to err by half as much again.

Whatever the dtype of the rows, they are read back as bfloat16. What is not a finite number comes back as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # channels that share a scale
ZSTD_LEVEL = 3

CodecName = Literal["bf16", "fp8", "int8"]
CompressionName = Literal["none", "zstd"]


@dataclass(frozen=True)
class Part:
    """One tensor of what is written: its dtype and the shape of a row."""

    dtype: torch.dtype
    row: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self.row)


class Codec(Protocol):
    """Both directions, and the tensors in between by name."""

    def parts(self, width: int) -> dict[str, Part]:
        """The tensors that rows of `width` channels become."""

    def encode(self, rows: Float[Tensor, "row width"]) -> dict[str, Tensor]:
        """Those tensors, one row each for a row."""

    def decode(self, parts: Mapping[str, Tensor]) -> BFloat16[Tensor, "row width"]:
        """Inverse of `encode`, up to its rounding. May share memory with `parts`."""


class Bf16:
    """Rounds to bfloat16 and no further."""

    def parts(self, width: int) -> dict[str, Part]:
        """See `Codec.parts`."""
        return {"values": Part(torch.bfloat16, (width,))}

    def encode(self, rows: Float[Tensor, "row width"]) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        return {"values": rows.to(torch.bfloat16)}

    def decode(self, parts: Mapping[str, Tensor]) -> BFloat16[Tensor, "row width"]:
        """See `Codec.decode`."""
        return parts["values"]


@dataclass(frozen=True)
class Blocks:
    """One byte a value and one scale a block; `largest` is the value that the largest of a block becomes."""

    dtype: torch.dtype
    largest: float

    def parts(self, width: int) -> dict[str, Part]:
        """See `Codec.parts`."""
        return {"values": Part(self.dtype, (width,)), "scales": Part(torch.bfloat16, (-(-width // BLOCK),))}

    def encode(self, rows: Float[Tensor, "row width"]) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        blocks = _blocks(rows.float())  # [row, block, BLOCK]
        scales = (blocks.abs().amax(-1) / self.largest).to(torch.bfloat16)
        # The scale was rounded, so the largest may lie a little beyond the range.
        scaled = (blocks / scales.float()[..., None]).clamp_(-self.largest, self.largest)
        # 0 / 0 in a block of zeros; a NaN has made its scale NaN, and with it the block that is read back.
        scaled.nan_to_num_(0.0)
        if not self.dtype.is_floating_point:
            scaled.round_()
        return {"values": scaled.flatten(1)[:, : rows.shape[1]].to(self.dtype), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor]) -> BFloat16[Tensor, "row width"]:
        """See `Codec.decode`."""
        values, scales = parts["values"], parts["scales"]
        # bfloat16 holds every value exactly, so its product with the scale is rounded once.
        blocks = _blocks(values.to(torch.bfloat16)) * scales[..., None]
        return blocks.flatten(1)[:, : values.shape[1]]


CODECS: dict[CodecName, Codec] = {
    "bf16": Bf16(),
    "fp8": Blocks(torch.float8_e4m3fn, 448.0),
    "int8": Blocks(torch.int8, 127.0),
}


def _blocks(rows: Tensor) -> Tensor:
    """[row, width] -> [row, block, BLOCK], the last block filled up with zeros."""
    blocks: Tensor = F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return blocks


def compress(tensor: Tensor) -> Tensor:
    """One zstd frame, as [bytes] uint8, of a contiguous tensor on the CPU.

    The first bytes of all elements come first, then the second bytes and so on: exponents resemble each other,
    mantissas do not.
    """
    planes = tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size()).T.contiguous()
    return torch.frombuffer(_zstd().compress(planes.numpy(), asbytes=False), dtype=torch.uint8)


def decompress(frame: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `compress`.

    Raises:
        ValueError: the frame is damaged, or holds something of another size.
    """
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        planes = np.frombuffer(_zstd().decompress(frame.numpy(), size), dtype=np.uint8)
    except OSError as error:
        raise ValueError(str(error)) from error
    return torch.from_numpy(planes.reshape(dtype.itemsize, -1).T.copy()).view(-1).view(dtype).view(shape)


def _zstd() -> Any:
    import pyarrow  # 25 MB of every training process, of no use to a store that is not compressed

    return pyarrow.Codec("zstd", ZSTD_LEVEL)  # not shared: prefetching reads from a thread of its own
