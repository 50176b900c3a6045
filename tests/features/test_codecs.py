"""Codecs round by no more than they say, and zstd not at all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sstf.features.codecs import BLOCK, CODECS, compress, decompress
from sstf.features.extract import ExtractConfig
from sstf.features.record import Record, taught
from sstf.features.spec import HiddenSignal, TopKSignal

WIDTHS = [1, 63, 64, 65, 100, 128, 576]


def rows_of(width: int, seed: int = 0, count: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of very different sizes, as in the middle layers of a target."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 3, width)[torch.randperm(width, generator=generator)]
    return (torch.randn(count, width, generator=generator) * sizes).to(dtype)


def naive_int8(rows: Tensor) -> Tensor:
    """Block by block and value by value, in Python numbers."""
    out = torch.zeros_like(rows)
    for r, row in enumerate(rows.tolist()):
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK]
            scale = float(torch.tensor(max(map(abs, block)) / 127).bfloat16())
            for i, value in enumerate(block):
                out[r, start + i] = max(-127, min(127, round(value / scale))) * scale if scale else 0.0
    return out


@pytest.mark.parametrize("width", WIDTHS)
def test_int8_is_the_naive_loop(width: int) -> None:
    rows = rows_of(width)
    codec = CODECS["int8"]
    expected = naive_int8(rows)
    found = codec.decode(codec.encode(rows))
    assert found.dtype == torch.bfloat16
    # Read back in bfloat16: one more rounding.
    torch.testing.assert_close(found.float(), expected.bfloat16().float(), rtol=0, atol=0)


def test_blocks_by_hand() -> None:
    """Two blocks: the first of scale 2 (254 / 127), the second, one channel wide, of scale 0.5."""
    rows = torch.zeros(1, 65)
    rows[0, :5] = torch.tensor([254.0, -254.0, 3.1, 2.9, 0.9])
    rows[0, 64] = -63.5
    parts = CODECS["int8"].encode(rows)
    assert parts["scales"].tolist() == [[2.0, 0.5]]
    assert parts["values"][0, [0, 1, 2, 3, 4, 5, 64]].tolist() == [127, -127, 2, 1, 0, 0, -127]
    assert CODECS["int8"].decode(parts)[0, [0, 1, 2, 3, 4, 5, 64]].tolist() == [254, -254, 4, 2, 0, 0, -63.5]
    parts = CODECS["fp8"].encode(torch.tensor([[896.0, 0.1, -34.0]]))  # scale 2; of -17, e4m3 keeps -16 or -18
    assert parts["scales"].tolist() == [[2.0]]
    assert parts["values"].float().tolist() == [[448.0, pytest.approx(0.05, rel=1 / 16), -16.0]]


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from(WIDTHS),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 65000.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    name=st.sampled_from(["bf16", "fp8", "int8"]),
)
def test_the_error_is_bounded_by_the_block(width: int, seed: int, scale: float, dtype: torch.dtype, name: str) -> None:
    rows = (rows_of(width, seed) / 3000 * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    codec = CODECS[name]  # type: ignore[index]
    encoded = codec.encode(rows)
    found = codec.decode(encoded).float()
    exact = rows.float()
    assert found.shape == rows.shape
    assert {key: (part.dtype, (7, *part.row)) for key, part in codec.parts(width).items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in encoded.items()
    }
    bound = exact.abs() * 2**-8  # bfloat16 keeps eight bits: half a unit of the last is 2^-9 of the value, twice
    for start in range(0, width, BLOCK):
        largest = exact[:, start : start + BLOCK].abs().amax(1, keepdim=True)
        if name == "int8":  # half a step, which is the largest / 127 up to the rounding of the scale
            bound[:, start : start + BLOCK] += largest / 127 / 2 * (1 + 2**-8)
        if name == "fp8":  # three bits and a half behind the point, and a smallest step of 2^-9 for 448
            bound[:, start : start + BLOCK] += exact[:, start : start + BLOCK].abs() * 2**-4
            bound[:, start : start + BLOCK] += largest / 448 * 2**-10 * (1 + 2**-8)
    assert bool(((found - exact).abs() <= bound).all())
    again = codec.encode(rows.clone())
    assert all(again[key].view(torch.uint8).equal(encoded[key].view(torch.uint8)) for key in encoded)


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_becomes_a_number(name: str, bad: float) -> None:
    rows = torch.ones(2, 70)
    rows[0, 3] = bad
    codec = CODECS[name]  # type: ignore[index]
    found = codec.decode(codec.encode(rows))
    assert not bool(found[0, 3].isfinite())
    assert bool(found[1].isfinite().all()) and bool(found[0, 64:].isfinite().all())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(0,), (1,), (7, 3), (0, 5), (4, 64), (300,)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.uint16, torch.float8_e4m3fn]),
    seed=st.integers(0, 99),
)
def test_zstd_loses_nothing(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    tensor = raw.view(dtype).view(shape)
    frame = compress(tensor)
    assert frame.dtype == torch.uint8 and frame.ndim == 1
    found = decompress(frame, dtype, shape)
    assert (found.dtype, tuple(found.shape)) == (dtype, shape)
    assert found.reshape(-1).view(torch.uint8).equal(raw)
    assert compress(tensor.clone()).equal(frame)


def test_shuffled_bfloat16_compresses_better_than_as_it_lies() -> None:
    values = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = values.reshape(-1).view(torch.uint8)
    assert len(compress(values)) < 0.95 * len(compress(plain)) < 0.85 * len(plain)


@pytest.mark.parametrize("shape", [(99,), (101,), (100, 2)])
def test_a_frame_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    frame = compress(torch.arange(100, dtype=torch.uint8) % 3)
    with pytest.raises(ValueError, match="ZSTD"):
        decompress(frame, torch.uint8, shape)
    with pytest.raises(ValueError, match="ZSTD"):
        decompress(frame[:-1], torch.uint8, (100,))


def test_bytes_a_token() -> None:
    """Of the usual 8H (bf16, three taps and the last state) with H = 576, every position taught."""
    usual = 8 * 576
    bf16 = Record(3 * 576, 576, 49152, "bf16", HiddenSignal())
    assert bf16.bytes_of(1, 1) == usual + 2 + 1 + 2 + 4  # id, mask, teacher's token, log-sum-exp
    int8 = Record(3 * 576, 576, 49152, "int8", TopKSignal(k=64))
    assert int8.bytes_of(1, 1) == 3 * 576 + 2 * 27 + 2 + 1 + 64 * 4
    assert int8.bytes_of(100, 100) / (100 * usual) < 0.45
    # A vocabulary beyond 65,536 takes four bytes an id; a width that 64 does not divide one more scale.
    wide = Record(3 * 100, 100, 65537, "int8", TopKSignal(k=2))
    assert wide.bytes_of(10, 3) == 10 * (300 + 2 * 5 + 4 + 1) + 3 * 2 * (4 + 2)


def test_taught_positions() -> None:
    assert taught(torch.tensor([1, 1, 0, 0, 1]).bool()).tolist() == [0, 3]
    assert taught(torch.tensor([True])).tolist() == []


def test_settings() -> None:
    plain = ExtractConfig()
    assert isinstance(plain.teacher, HiddenSignal)
    assert ExtractConfig.model_validate({"teacher": {"kind": "topk"}}).teacher == TopKSignal(k=64)
