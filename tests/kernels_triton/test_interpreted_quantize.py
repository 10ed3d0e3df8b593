"""The quantizing kernels give the reference's bits: codes, scales and the padding behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    K_BY_MN,
    K_MAJOR,
    K_MAJOR_TRANSPOSED,
    MN_MAJOR,
    MN_MAJOR_PADDED,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MXFP8,
    SWIZZLED_32_4_4,
    BlockFormat,
    ScaleLayout,
)
from blockscale.reference import quantize, relayout
from blockscale.reference.fused import silu_and_multiply
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("interpreted")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNPACKED = [K_MAJOR, MN_MAJOR, MN_MAJOR_TMA_ALIGNED, K_BY_MN, K_MAJOR_TRANSPOSED, MN_MAJOR_PADDED]
FORMS = [
    *((FP8_1X128_FP32, layout) for layout in UNPACKED),
    *((FP8_1X128_UE8M0, layout) for layout in (K_MAJOR, MN_MAJOR, MN_MAJOR_TMA_ALIGNED_PACKED)),
    *((MXFP8, layout) for layout in (K_MAJOR, MN_MAJOR_TMA_ALIGNED_PACKED, SWIZZLED_32_4_4)),
]
SHAPES = [(1, 128), (3, 640), (9, 1032), (8, 96), (33, 200)]


def values_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers, rows of very different magnitude, a block of zeros, tiny and huge values."""
    generator = torch.Generator().manual_seed(seed + shape[1])
    values = torch.randn(shape, generator=generator)
    values *= 2.0 ** torch.randint(-12, 8, (shape[0], 1), generator=generator)
    values[-1, : shape[1] // 2] = 0
    values[0, 0], values[0, -1] = 6e4, -1e-7
    return values.to(dtype)


def spec(values: torch.Tensor, fmt: BlockFormat, layout: ScaleLayout, **changes: int) -> object:
    from blockscale.kernels.triton.destination import QuantizerSpec

    facts = {"k": values.shape[1], "device": 0, **changes}
    return QuantizerSpec(fmt, layout, values.dtype, **facts)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the whole storage, padding included."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def assert_same(
    codes: torch.Tensor, scales: torch.Tensor, expected: BlockScaledTensor, layout: ScaleLayout
) -> None:
    found = BlockScaledTensor(codes, scales, expected.format, layout)
    wanted = relayout(expected, layout)
    assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(memory(found.scales), memory(wanted.scales))


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of 0xFF: what a kernel does not write shows."""

    def full(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            memory(tensor).fill_(0xFF)
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", full(torch.empty))
    monkeypatch.setattr(torch, "empty_strided", full(torch.empty_strided))


@pytest.mark.parametrize(("fmt", "layout"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizer(
    monkeypatch: pytest.MonkeyPatch,
    fmt: BlockFormat,
    layout: ScaleLayout,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    values = values_of(shape, dtype)
    expected = quantize(values, fmt)
    quantizer = activation_quantizer(spec(values, fmt, layout))
    poisoned(monkeypatch)
    codes, scales = quantizer(values)
    assert_same(codes, scales, expected, layout)


def test_no_rows_launch_nothing() -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    values = torch.zeros(0, 256)
    for layout in (*UNPACKED, SWIZZLED_32_4_4):
        fmt = MXFP8 if layout is SWIZZLED_32_4_4 else FP8_1X128_FP32
        codes, scales = activation_quantizer(spec(values, fmt, layout))(values)
        assert BlockScaledTensor(codes, scales, fmt, layout).mn == 0


@pytest.mark.parametrize("m", [1, 3, 4, 7])
def test_rows_are_padded_with_zeros_where_asked(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    values = values_of((m, 256), torch.bfloat16)
    asked = spec(values, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED, row_multiple=4)
    poisoned(monkeypatch)
    codes, scales = activation_quantizer(asked)(values)
    assert_same(codes, scales, quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)
    assert not memory(codes)[m * 256 :].any()
    assert len(memory(codes)) == -(-m // 4) * 4 * 256


def test_rows_may_lie_apart() -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    wide = values_of((5, 700), torch.bfloat16)
    for view in (wide[:, :384], wide[:, 3:387], wide[::2, 8:392]):
        quantizer = activation_quantizer(spec(view, FP8_1X128_FP32, MN_MAJOR))
        assert_same(*quantizer(view), quantize(view, FP8_1X128_FP32), MN_MAJOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", [FP8_1X128_FP32, FP8_1X128_UE8M0], ids=str)
def test_nan_and_infinity_are_what_the_reference_makes_of_them(
    bad: float, fmt: BlockFormat
) -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    values = torch.tensor([[1.0, -2.0, 0.0, -0.0] * 96])
    values[0, 5] = bad
    codes, scales = activation_quantizer(spec(values, fmt, K_MAJOR))(values)
    expected = quantize(values, fmt)
    is_nan = expected.data.float().isnan()
    assert torch.equal(codes.float().isnan(), is_nan)
    found, wanted = codes.view(torch.uint8), expected.data.view(torch.uint8)
    assert torch.equal(found[~is_nan], wanted[~is_nan])
    assert torch.equal(scales.float().isnan(), expected.scales.float().isnan())
    assert torch.equal(scales.float().nan_to_num(), expected.scales.float().nan_to_num())


@pytest.mark.parametrize("exponent", [-30, -9, -1, 0, 1, 14])
def test_amax_one_ulp_beside_powers_of_two(exponent: int) -> None:
    from blockscale.kernels.triton.quantize import activation_quantizer

    middle = torch.tensor(448.0 * 2.0**exponent)
    steps = [torch.nextafter(middle, torch.tensor(x)) for x in (0.0, 1e30)]
    values = torch.stack([middle, *steps])[:, None] * torch.ones(1, 128)
    codes, scales = activation_quantizer(spec(values, FP8_1X128_UE8M0, K_MAJOR))(values)
    assert_same(codes, scales, quantize(values, FP8_1X128_UE8M0), K_MAJOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "layout"),
    [(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED), (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 128), (9, 520), (3, 1032)], ids=str)
def test_silu_and_multiply(
    dtype: torch.dtype, fmt: BlockFormat, layout: ScaleLayout, shape: tuple[int, int]
) -> None:
    from blockscale.kernels.triton.quantize import silu_multiply_quantizer

    m, k = shape
    gate_up = (values_of((m, 2 * k), dtype).float() / 16).to(dtype)
    gate_up[0, :6] = torch.tensor([-1e4, 6e4, -88.0, 88.0, -0.0, 0.0]).to(dtype)
    product = silu_and_multiply(gate_up)
    quantizer = silu_multiply_quantizer(spec(product, fmt, layout))
    assert_same(*quantizer(gate_up), quantize(product, fmt), layout)
