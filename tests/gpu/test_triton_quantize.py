"""The Triton quantizers on a GPU: the reference's bits, padding included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

import triton
import triton.language as tl

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
from blockscale.kernels.triton.arithmetic import reciprocal_exactly
from blockscale.kernels.triton.destination import QuantizerSpec
from blockscale.kernels.triton.normalize import NormalizeQuantizer
from blockscale.kernels.triton.quantize import (
    activation_quantizer,
    quantize_rows,
    silu_multiply_quantizer,
)
from blockscale.reference import quantize, relayout
from blockscale.reference.fused import add_and_normalize, silu_and_multiply
from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNPACKED = [K_MAJOR, MN_MAJOR, MN_MAJOR_TMA_ALIGNED, K_BY_MN, K_MAJOR_TRANSPOSED, MN_MAJOR_PADDED]
FORMS = [
    *((FP8_1X128_FP32, layout) for layout in UNPACKED),
    *((FP8_1X128_UE8M0, layout) for layout in (K_MAJOR, MN_MAJOR_TMA_ALIGNED_PACKED)),
    *((MXFP8, layout) for layout in (K_MAJOR, MN_MAJOR_TMA_ALIGNED_PACKED, SWIZZLED_32_4_4)),
]
SHAPES = [(1, 128), (7, 576), (33, 7168)]
RAGGED = [(129, 300), (128, 1032), (3, 77)]  # each is compiled anew


def values_of(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the CPU, rows of different magnitude, zeros, tiny and huge values."""
    generator = torch.Generator().manual_seed(seed + m + k)
    values = torch.randn((m, k), generator=generator)
    values *= 2.0 ** torch.randint(-12, 8, (m, 1), generator=generator)
    values[-1, : k // 2] = 0
    values[0, 0], values[0, -1] = 6e4, -1e-7
    return values.to(dtype)


def spec(values: torch.Tensor, fmt: BlockFormat, layout: ScaleLayout) -> QuantizerSpec:
    return QuantizerSpec(fmt, layout, values.dtype, values.shape[1], torch.cuda.current_device())


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the whole storage, padding included, on the CPU."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage()).cpu()


def assert_same(
    codes: torch.Tensor, scales: torch.Tensor, expected: BlockScaledTensor, layout: ScaleLayout
) -> None:
    """Equal to the CPU's reference, byte for byte."""
    found = BlockScaledTensor(codes, scales, expected.format, layout)
    wanted = relayout(expected, layout)
    assert torch.equal(found.data.cpu().view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(memory(found.scales), memory(wanted.scales))


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Memory that the allocator hands out next is full of 0xFF: unwritten bytes show."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(("fmt", "layout"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizer(fmt: BlockFormat, layout: ScaleLayout, dtype: torch.dtype) -> None:
    is_main = layout in {MN_MAJOR_TMA_ALIGNED, MN_MAJOR_TMA_ALIGNED_PACKED}
    for m, k in SHAPES + (RAGGED if is_main else []):
        values = values_of(m, k, dtype)
        codes, scales = activation_quantizer(spec(values, fmt, layout))(values.cuda())
        assert_same(codes, scales, quantize(values, fmt), layout)


def test_no_rows_launch_nothing() -> None:
    for fmt, layout in FORMS:
        found = quantize_rows(torch.zeros(0, 256, device="cuda"), fmt, layout)
        assert (found.mn, found.k) == (0, 256)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_start_anywhere(dtype: torch.dtype) -> None:
    wide = values_of(9, 1500, dtype)
    for rows, columns in ((slice(None), slice(0, 1024)), (slice(1, None, 2), slice(3, 1027))):
        view, there = wide[rows, columns], wide.cuda()[rows, columns]
        found = quantize_rows(there, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
        expected = quantize(view, FP8_1X128_FP32)
        assert_same(found.data, found.scales, expected, MN_MAJOR_TMA_ALIGNED)


@triton.jit
def every_reciprocal_kernel(out, first, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803 - Triton
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out + place, reciprocal_exactly((place + first).to(tl.float32, bitcast=True)))


@pytest.mark.parametrize("exponent", [1, 85, 127, 200, 247, 252])
def test_reciprocals_are_rounded_correctly_for_every_mantissa(exponent: int) -> None:
    count, first = 1 << 23, exponent << 23
    out = torch.empty(count, device="cuda")
    every_reciprocal_kernel[(count // 1024,)](out, first, COUNT=1024)
    values = torch.arange(first, first + count, dtype=torch.int32, device="cuda")
    values = values.view(torch.float32)
    assert torch.equal(out, torch.ones_like(values) / values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", [FP8_1X128_FP32, FP8_1X128_UE8M0], ids=str)
def test_nan_and_infinity_are_what_the_reference_makes_of_them(
    bad: float, fmt: BlockFormat
) -> None:
    values = torch.tensor([[1.0, -2.0, 0.0, -0.0] * 96])
    values[0, 5] = bad
    found = quantize_rows(values.cuda(), fmt, K_MAJOR)
    expected = quantize(values, fmt)
    codes, scales = found.data.cpu(), found.scales.cpu().float()
    is_nan = expected.data.float().isnan()
    assert torch.equal(codes.float().isnan(), is_nan)
    assert torch.equal(codes.view(torch.uint8)[~is_nan], expected.data.view(torch.uint8)[~is_nan])
    assert torch.equal(scales.isnan(), expected.scales.float().isnan())
    assert torch.equal(scales.nan_to_num(), expected.scales.float().nan_to_num())


def test_amax_one_ulp_beside_powers_of_two() -> None:
    middle = 448.0 * 2.0 ** torch.arange(-40, 100).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, 3e38)]
    values = torch.cat([middle, *beside])[:, None] * torch.ones(1, 128)
    found = quantize_rows(values.cuda(), FP8_1X128_UE8M0, K_MAJOR)
    assert_same(found.data, found.scales, quantize(values, FP8_1X128_UE8M0), K_MAJOR)


def test_more_than_2_to_the_31_elements() -> None:
    m, k = 300_000, 7168
    values = torch.ones((m, k), dtype=torch.bfloat16, device="cuda")
    last = values_of(5, k, torch.bfloat16)
    values[-5:] = last.cuda()
    found = quantize_rows(values, FP8_1X128_FP32, MN_MAJOR)
    expected = quantize(last, FP8_1X128_FP32)
    assert torch.equal(found.data[-5:].cpu().view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(found.scales[-5:].cpu(), expected.scales)


FUSED_FORMS = [
    (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
]


@pytest.mark.parametrize(("fmt", "layout"), FUSED_FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_multiply(fmt: BlockFormat, layout: ScaleLayout, dtype: torch.dtype) -> None:
    for m, k in ((1, 128), (33, 1536), (129, 520)):
        gate_up = (values_of(m, 2 * k, dtype).float() / 16).to(dtype)
        gate_up[0, :6] = torch.tensor([-1e4, 6e4, -88.0, 88.0, -0.0, 0.0]).to(dtype)
        product = silu_and_multiply(gate_up)
        codes, scales = silu_multiply_quantizer(spec(product, fmt, layout))(gate_up.cuda())
        assert_same(codes, scales, quantize(product, fmt), layout)


@pytest.mark.parametrize(("fmt", "layout"), FUSED_FORMS, ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_and_normalize(
    fmt: BlockFormat, layout: ScaleLayout, has_residual: bool, dtype: torch.dtype
) -> None:
    for m, k in ((1, 128), (33, 7168), (5, 1000), (6, 16384)):
        values = values_of(m, k, dtype)
        residual = values_of(m, k, dtype, seed=1) if has_residual else None
        if residual is not None:
            # 6e4 + 6e4 is infinite in float16, and NaNs have other bits on a GPU than on x86.
            residual[0, 0] = -1.0
        weight = torch.rand(k, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = add_and_normalize(values, residual, weight, 1e-6)
        quantizer = NormalizeQuantizer(
            spec(values, fmt, layout), weight.cuda(), 1e-6, has_residual=has_residual
        )
        codes, scales, summed = quantizer(
            values.cuda(), None if residual is None else residual.cuda()
        )
        bits = expected.summed.view(torch.uint8)
        assert torch.equal(summed.cpu().view(torch.uint8), bits)
        assert_same(codes, scales, quantize(expected.normalized, fmt), layout)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_normalizing_every_value_of_two_bytes(has_residual: bool, dtype: torch.dtype) -> None:
    """The instructions on pairs of halves: subnormals, infinities and NaNs have their own rows."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(128, 512)
    residual = every.flip(0) if has_residual else None
    weight = ((torch.arange(512) % 97 - 48) / 32).to(dtype)
    expected = add_and_normalize(every, residual, weight, 1e-6)
    quantizer = NormalizeQuantizer(
        spec(every, FP8_1X128_FP32, K_MAJOR), weight.cuda(), 1e-6, has_residual=has_residual
    )
    codes, scales, summed = quantizer(every.cuda(), None if residual is None else residual.cuda())
    wanted = quantize(expected.normalized, FP8_1X128_FP32)
    pairs = ((summed, expected.summed), (codes, wanted.data), (scales, wanted.scales))
    for found, right in pairs:
        numbers, rights = found.cpu().float(), right.float()
        assert torch.equal(numbers.isnan(), rights.isnan())
        bits = numbers.nan_to_num().view(torch.int32)
        assert torch.equal(bits, rights.nan_to_num().view(torch.int32))


def test_packed_scales_are_deep_gemms_own_packing() -> None:
    deep_gemm = pytest.importorskip("deep_gemm", reason="carry the wheel sgl-deep-gemm 0.1.5")
    for m, k in ((1, 512), (7, 640), (128, 7168), (129, 2304)):
        values = values_of(m, k, torch.bfloat16).cuda()
        found = quantize_rows(values, FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED)
        powers = relayout(quantize(values, FP8_1X128_UE8M0), K_MAJOR, FP8_1X128_FP32.scale)
        theirs = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(powers.scales)
        assert theirs.shape == found.scales.shape
        assert theirs.stride() == found.scales.stride()
        assert torch.equal(theirs, found.scales)
