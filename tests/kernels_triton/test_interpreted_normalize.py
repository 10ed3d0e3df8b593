"""The RMSNorm kernel gives the bits of the reference's normalization and quantization."""

from __future__ import annotations

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MXFP8,
    SWIZZLED_32_4_4,
    BlockFormat,
    ScaleLayout,
)
from blockscale.reference import quantize, relayout
from blockscale.reference.fused import add_and_normalize
from blockscale.tensor import BlockScaledTensor

pytestmark = pytest.mark.usefixtures("interpreted")

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
MAIN = (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
FORMS = [
    (FP8_1X128_FP32, K_MAJOR),
    (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
    (MXFP8, MN_MAJOR_TMA_ALIGNED_PACKED),
    (MXFP8, SWIZZLED_32_4_4),
]


def values_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers, rows of very different magnitude, zeros, tiny and huge values."""
    generator = torch.Generator().manual_seed(seed + shape[1])
    values = torch.randn(shape, generator=generator)
    values *= 2.0 ** torch.randint(-12, 8, (shape[0], 1), generator=generator)
    values[-1, : shape[1] // 2] = 0
    values[0, 0], values[0, -1] = 6e4, -1e-7
    return values.to(dtype)


def weight_of(values: torch.Tensor) -> torch.Tensor:
    """Both signs."""
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(values.shape[1], generator=generator) - 0.25).to(values.dtype)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def assert_same_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for those of NaN."""
    is_nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), is_nan)
    found, expected = found.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def assert_normalizes(
    values: torch.Tensor,
    residual: torch.Tensor | None,
    form: tuple[BlockFormat, ScaleLayout],
    epsilon: float = 1e-6,
    row_multiple: int = 1,
) -> torch.Tensor:
    """The codes, whose storage may go on behind them."""
    from blockscale.kernels.triton.destination import QuantizerSpec
    from blockscale.kernels.triton.normalize import NormalizeQuantizer

    fmt, layout = form
    weight = weight_of(values)
    expected = add_and_normalize(values, residual, weight, epsilon)
    spec = QuantizerSpec(fmt, layout, values.dtype, values.shape[1], 0, row_multiple)
    quantizer = NormalizeQuantizer(spec, weight, epsilon, has_residual=residual is not None)
    codes, scales, summed = quantizer(values, residual)
    assert_same_numbers(summed, expected.summed)
    found = BlockScaledTensor(codes, scales, fmt, layout)
    wanted = relayout(quantize(expected.normalized, fmt), layout)
    assert_same_numbers(found.data.float(), wanted.data.float())
    if scales.dtype.is_floating_point:
        assert_same_numbers(found.scales.float(), wanted.scales.float())
    else:
        assert torch.equal(memory(found.scales), memory(wanted.scales))
    return codes


# One tile to four, ragged and whole, by one warp to four.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (5, 520), (2, 1152), (3, 2048), (1, 7168)], ids=str)
def test_add_and_normalize(dtype: torch.dtype, has_residual: bool, shape: tuple[int, int]) -> None:
    values = values_of(shape, dtype)
    residual = values_of(shape, dtype, seed=1) if has_residual else None
    assert_normalizes(values, residual, MAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_formats_and_layouts(dtype: torch.dtype, form: tuple[BlockFormat, ScaleLayout]) -> None:
    assert_normalizes(values_of((5, 1120), dtype), None, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_start_anywhere_or_have_an_odd_width(dtype: torch.dtype) -> None:
    wide = values_of((5, 700), dtype)
    residual = values_of((5, 700), dtype, seed=1)
    for columns in (slice(0, 384), slice(3, 387), slice(8, 309), slice(1, 302)):
        assert_normalizes(wide[:, columns], residual[:, columns], MAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 301])
def test_rows_are_padded_with_zeros_where_asked(dtype: torch.dtype, k: int) -> None:
    codes = assert_normalizes(values_of((5, k), dtype), None, MAIN, row_multiple=4)
    assert len(memory(codes)) == 8 * k
    assert not memory(codes)[5 * k :].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_every_value_of_two_bytes(dtype: torch.dtype, epsilon: float) -> None:
    """A row holds one sign and a few exponents: subnormals, infinities and NaNs have their own."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_normalizes(every.reshape(128, 512), None, MAIN, epsilon)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(dtype: torch.dtype, bad: float) -> None:
    values, residual = values_of((3, 384), dtype), values_of((3, 384), dtype, seed=1)
    values[1, 5] = bad
    assert_normalizes(values, residual, MAIN)
    assert_normalizes(values, None, (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED))
