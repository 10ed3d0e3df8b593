"""The C++ kernel: exact where no tolerance is needed, then its error against float64."""

from __future__ import annotations

import pytest
import torch

from blockscale.backends.cpu import Cpu
from blockscale.errors import FormatError
from blockscale.formats import FP8_128X128_FP32, K_MAJOR, BlockFormat, BlockShape, DType
from blockscale.kernels.cpu.product import (
    MAX_DIRECT_TOKENS,
    WeightOnlyProduct,
    dequantize_rows,
)
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import dequantize, quantize
from blockscale.tensor import BlockScaledTensor

MS = (1, 2, 3, 4, 5, 7, MAX_DIRECT_TOKENS, MAX_DIRECT_TOKENS + 1, 33)
SHAPES = ((1, 1), (7, 33), (64, 128), (130, 300), (192, 576), (576, 1536))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error over the row's sum of magnitudes: float32 sums of up to 1536 products rounded once
# to the output dtype (half an ulp: 2^-9 for bfloat16, 2^-12 for float16).
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def integers(n: int, k: int, fmt: BlockFormat = FP8_128X128_FP32) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(n * 31 + k)
    data = torch.randint(-4, 5, (n, k), generator=generator).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-2, 3, fmt.block.grid(n, k), generator=generator)
    return BlockScaledTensor(data, scales, fmt, K_MAJOR)


def product(weight: BlockScaledTensor) -> WeightOnlyProduct:
    block = weight.format.block
    return WeightOnlyProduct(weight.data, weight.scales, (block.mn, block.k))


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_with_powers_of_two_are_exact(m: int, shape: tuple[int, int]) -> None:
    n, k = shape
    weight = integers(n, k)
    activation = torch.randint(-3, 4, (m, k), generator=torch.Generator().manual_seed(m)).float()
    out = torch.full((m, n), float("nan"))
    product(weight)(activation, out, None)
    assert torch.equal(out.double(), activation.double() @ dequantize(weight).double().T)


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (32, 32), (1, 32), (64, 48)], ids=str)
def test_scale_fingerprint(m: int, block: tuple[int, int]) -> None:
    """All codes one and each block its own power of two: a wrong scale index would show."""
    n, k = 200, 300
    fmt = BlockFormat(FP8_128X128_FP32.element, FP8_128X128_FP32.scale, BlockShape(*block))
    rows, columns = fmt.block.grid(n, k)
    exponents = (torch.arange(rows * columns) % 11).float().reshape(rows, columns)
    weight = BlockScaledTensor(
        torch.ones(n, k).to(torch.float8_e4m3fn), 2.0**exponents, fmt, K_MAJOR
    )
    out = torch.full((m, n), float("nan"))
    product(weight)(torch.ones(m, k), out, None)
    assert torch.equal(out, dequantize(weight).sum(1).expand(m, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("shape", [(130, 300), (576, 1536)], ids=str)
def test_error_against_float64(dtype: torch.dtype, m: int, shape: tuple[int, int]) -> None:
    n, k = shape
    generator = torch.Generator().manual_seed(m + n)
    weight = quantize(torch.randn(n, k, generator=generator), FP8_128X128_FP32)
    activation = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    product(weight)(activation, out, bias)
    exact = activation.double() @ dequantize(weight).double().T + bias.double()
    magnitude = activation.double().abs() @ dequantize(weight).double().abs().T
    assert ((out.double() - exact).abs() <= LIMITS[dtype] * (magnitude + 1)).all()


def test_all_256_codes_decode_as_the_reference_does() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(4, 1)
    data = codes.view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 3.25]])
    out = torch.empty(4, 256)
    dequantize_rows(data, scales, (128, 128), 0, out)
    expected = data.float() * scales.repeat_interleave(128, 1)
    finite = ~expected.isnan()
    assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("first", [0, 1, 127, 128, 150])
def test_rows_are_dequantized_bit_for_bit(first: int) -> None:
    weight = quantize(torch.randn(192, 333), FP8_128X128_FP32)
    out = torch.full((192 - first, 333), float("nan"))
    dequantize_rows(weight.data, weight.scales, (128, 128), first, out)
    assert torch.equal(out, dequantize(weight)[first:])


@pytest.mark.parametrize("m", [1, 4, 33])
def test_bits_do_not_depend_on_the_number_of_threads(m: int) -> None:
    weight = quantize(torch.randn(576, 1536), FP8_128X128_FP32)
    activation = torch.randn(m, 1536)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(m, 576)
            if m <= MAX_DIRECT_TOKENS:
                product(weight)(activation, out, None)
                results.append(out)
            else:
                rows = torch.empty(576, 1536)
                results.append(
                    dequantize_rows(weight.data, weight.scales, (128, 128), 0, rows).clone()
                )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_of_the_activation_may_be_strided() -> None:
    weight = integers(64, 128)
    wide = torch.ones(4, 300)
    out = torch.empty(4, 64)
    product(weight)(wide[:, :128], out, None)
    assert torch.equal(out, torch.ones(4, 128) @ dequantize(weight).T)


@pytest.mark.parametrize("m", [1, 4, MAX_DIRECT_TOKENS + 1])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (130, 300), (7, 33)], ids=str)
def test_rows_of_the_weight_may_have_gaps(m: int, n: int, k: int) -> None:
    """A view of a wider weight is the same weight; codes in the gaps are 448 and would show."""
    weight = integers(n, k)
    wide = torch.full((n, k + 100), 448.0).to(torch.float8_e4m3fn)
    wide.narrow(1, 50, k).copy_(weight.data)
    view = BlockScaledTensor(wide.narrow(1, 50, k), weight.scales, weight.format, K_MAJOR)
    assert not view.data.is_contiguous()
    activation = torch.randint(-3, 4, (m, k), generator=torch.Generator().manual_seed(m)).float()
    out = torch.full((m, n), float("nan"))
    product(view)(activation, out, None)
    assert torch.equal(out.double(), activation.double() @ dequantize(weight).double().T)


def test_nan_codes_are_refused_at_prepare() -> None:
    weight = integers(64, 128)
    weight.data.view(torch.uint8)[3, 3] = 0x7F
    request = LinearRequest("x", 64, 128, FP8_128X128_FP32, DType.FLOAT32, DType.FLOAT32)
    backend = Cpu()
    plan = plan_linear(request, Device.named("cpu"), PlanPolicy(), [backend])
    with pytest.raises(FormatError, match="NaN codes"):
        backend.prepare(weight, plan.choices[0].offer)


def test_all_positive_data_does_not_hide_a_missing_term() -> None:
    weight = quantize(torch.rand(130, 700) + 0.5, FP8_128X128_FP32)
    activation = torch.rand(3, 700) + 0.5
    out = torch.empty(3, 130)
    product(weight)(activation, out, None)
    exact = activation.double() @ dequantize(weight).double().T
    assert ((out.double() - exact).abs() / exact < 1e-5).all()
