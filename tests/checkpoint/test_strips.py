"""Matrices quantized strip by strip: the reference's bits, whatever the shape, dtype and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint import strips
from blockscale.checkpoint.header import read_header
from blockscale.checkpoint.strips import StripQuantizer
from blockscale.errors import CheckpointError
from blockscale.formats import (
    E4M3FN,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    BlockFormat,
    BlockShape,
    ScaleFormat,
)
from blockscale.reference import quantize, scale_values

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    FP8_32X32_UE8M0,
    BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(1, 32)),
)
SHAPES = ((1, 1), (128, 128), (300, 200), (129, 640), (7, 1000), (512, 96))
PLENTY = 1 << 30


def strip_quantized(
    values: torch.Tensor, fmt: BlockFormat, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    save_file({"w": values}, folder / "w.safetensors")
    (entry,) = read_header(folder / "w.safetensors").tensors
    codes = bytearray()
    scales = StripQuantizer(fmt, PLENTY).quantize(entry, codes.extend)
    grid = fmt.block.grid(*values.shape)
    return (
        torch.frombuffer(codes, dtype=torch.uint8).view(values.shape),
        torch.frombuffer(bytearray(scales), dtype=torch.float32).view(grid),
    )


def hard(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random values over all magnitudes, zeros and subnormals of the dtype, in random signs."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    values = torch.randn(shape, generator=generator)
    if dtype is not torch.float16:
        values *= 2.0 ** torch.randint(-100, 100, shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values[torch.rand(shape, generator=generator) < 0.1] = -torch.finfo(dtype).smallest_normal / 4
    values = values.to(dtype)
    values[0, 0] = torch.finfo(dtype).max
    return values


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bits_are_the_references(
    fmt: BlockFormat, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 500_000)
    for shape in SHAPES:
        values = hard(shape, dtype)
        codes, scales = strip_quantized(values, fmt, tmp_path)
        expected = quantize(values, fmt)
        assert torch.equal(scales, scale_values(expected))
        assert torch.equal(codes, expected.data.view(torch.uint8))


def test_every_bfloat16_is_quantized_as_the_reference_does(tmp_path: Path) -> None:
    """All finite values, each in a block with the largest magnitude that shares its exponent."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every[torch.isfinite(every)].reshape(-1, 128)
    codes, scales = strip_quantized(values, FORMATS[3], tmp_path)
    expected = quantize(values, FORMATS[3])
    assert torch.equal(codes, expected.data.view(torch.uint8))
    assert torch.equal(scales, scale_values(expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_nan_and_infinity_are_named(bad: float, fmt: BlockFormat, tmp_path: Path) -> None:
    values = torch.ones(300, 200, dtype=torch.bfloat16)
    values[250, 100] = bad
    with pytest.raises(CheckpointError, match="holds NaN or Inf in rows") as caught:
        strip_quantized(values, fmt, tmp_path)
    assert caught.value.tensor == "w"
