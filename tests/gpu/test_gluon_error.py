"""The Gluon kernels' error against the float64 product of the dequantized operands.

Limits: emulated from the tensor cores' documented behaviour: sums of 128
products keep 13 fraction bits below the largest, truncated; promotion to float32 follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.reference import block_scaled_matmul, dequantize, quantize, relayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the Gluon kernels run on SM90 (H100, H200)",
    ),
]

SHAPES = ((1, 4096, 7168), (16, 2112, 7168), (64, 7168, 2048), (128, 576, 7168), (300, 4096, 4096))
# Of the result's norm, for normal data; bfloat16 and float16 add their own rounding.
RELATIVE = {torch.float32: 3e-4, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
# Of each element's sum of magnitudes (truncation on one side), and of its own magnitude (rounding).
TRUNCATION = 1.2e-3
# Half of float16's smallest number comes on top.
SMALLEST = 2.0**-25
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda")


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda")


def spread(*shape: int) -> torch.Tensor:
    """Neighbouring blocks differ by up to 2^20: a scale of the wrong block is a million off."""
    values = torch.randn(shape, device="cuda")
    rows = torch.arange(shape[0], device="cuda") // 128 * 7
    blocks = torch.arange(shape[1], device="cuda") // 128 * 3
    return values * 2.0 ** ((rows[:, None] + blocks) % 20 - 17.0)


def operands(
    make: Callable[..., torch.Tensor], m: int, n: int, k: int
) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    torch.manual_seed(m + n + k)
    activation = relayout(quantize(make(m, k), FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)
    return activation, quantize(make(n, k), FP8_128X128_FP32)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [normal, positive, spread])
def test_error_against_float64(
    make: Callable[..., torch.Tensor], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    activation, weight = operands(make, m, n, k)
    expected = block_scaled_matmul(activation, weight, torch.float64)
    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    GluonProduct(weight)(activation, out, None)
    error = (out.double() - expected).abs()
    magnitudes = dequantize(activation).double().abs() @ dequantize(weight).double().abs().T
    limit = TRUNCATION * magnitudes + ROUNDING[dtype] * expected.abs() + SMALLEST
    assert (error <= limit).all()
    if make is normal:
        assert error.norm() <= RELATIVE[dtype] * expected.norm()


@pytest.mark.parametrize("m", [16, 300])
def test_float16_overflows_to_infinity_like_a_cast(m: int) -> None:
    activation, weight = operands(positive, m, 256, 7168)
    activation.scales.mul_(1000.0)
    out = torch.empty((m, 256), dtype=torch.float16, device="cuda")
    GluonProduct(weight)(activation, out, None)
    assert (out == float("inf")).all()
