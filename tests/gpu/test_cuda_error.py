"""``gemm.cu`` on real numbers: near the float64 product."""

from __future__ import annotations

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.reference import block_scaled_matmul, dequantize, quantize, relayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="gemm.cu runs on SM90 (H100, H200)",
    ),
]

# As in test_gluon_error.py.
RELATIVE = {torch.float32: 3e-4, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
TRUNCATION, SMALLEST = 1.2e-3, 2.0**-25
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 7168), (128, 576, 7168), (300, 4096, 1024)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_error_against_float64(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from blockscale.kernels.cuda.product import CudaProduct

    m, n, k = shape
    torch.manual_seed(m + n + k)
    make = torch.randn if kind == "normal" else torch.rand
    a = relayout(quantize(make(m, k, device="cuda"), FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)
    b = quantize(make(n, k, device="cuda"), FP8_128X128_FP32)
    expected = block_scaled_matmul(a, b, torch.float64)
    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    CudaProduct(b)(a, out, None)
    error = (out.double() - expected).abs()
    magnitudes = dequantize(a).double().abs() @ dequantize(b).double().abs().T
    limit = TRUNCATION * magnitudes + ROUNDING[dtype] * expected.abs() + SMALLEST
    assert (error <= limit).all()
    if kind == "normal":
        assert error.norm() <= RELATIVE[dtype] * expected.norm()
