"""The reference product: exact where no tolerance is needed, and against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockscale.errors import FormatError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    BlockFormat,
)
from blockscale.reference import block_scaled_matmul, dequantize, quantize
from blockscale.tensor import BlockScaledTensor


def integers(mn: int, k: int, fmt: BlockFormat, seed: int) -> BlockScaledTensor:
    """Codes of small integers with power-of-two scales: every partial sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, (mn, k), generator=generator).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-3, 4, fmt.block.grid(mn, k), generator=generator)
    return BlockScaledTensor(data, scales, fmt, K_MAJOR)


@pytest.mark.parametrize("shape", [(1, 64, 128), (7, 192, 576), (33, 130, 300)], ids=str)
def test_integers_with_powers_of_two_are_exact(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    activation = integers(m, k, FP8_1X128_FP32, 1)
    weight = integers(n, k, FP8_128X128_FP32, 2)
    exact = dequantize(activation).double().numpy() @ dequantize(weight).double().numpy().T
    for accumulate in (torch.float32, torch.float64):
        result = block_scaled_matmul(activation, weight, accumulate)
        np.testing.assert_array_equal(result.double().numpy(), exact)


def test_scale_fingerprint() -> None:
    """All codes one, each block its own power of two: a wrong scale index would show."""
    k_blocks, n_blocks = 4, 3
    m, n, k = 2, n_blocks * 128, k_blocks * 128
    ones = torch.ones(n, k).to(torch.float8_e4m3fn)
    exponents = torch.arange(n_blocks * k_blocks, dtype=torch.float32).reshape(n_blocks, k_blocks)
    weight = BlockScaledTensor(ones, 2.0**exponents, FP8_128X128_FP32, K_MAJOR)
    activation = quantize(torch.ones(m, k), FP8_1X128_UE8M0)
    result = block_scaled_matmul(activation, weight, torch.float64)
    for block in range(n_blocks):
        expected = 128 * float((2.0 ** exponents[block]).sum())
        assert (result[:, block * 128 : (block + 1) * 128] == expected).all()


def test_leading_axes_broadcast() -> None:
    activation = quantize(torch.randn(3, 5, 256), FP8_1X128_FP32)
    weight = quantize(torch.randn(3, 128, 256), FP8_128X128_UE8M0)
    result = block_scaled_matmul(activation, weight)
    assert result.shape == (3, 5, 128)


def test_different_k_is_refused() -> None:
    with pytest.raises(FormatError, match="K=128 but weight has K=256"):
        block_scaled_matmul(
            quantize(torch.ones(1, 128), FP8_1X128_FP32),
            quantize(torch.ones(128, 256), FP8_128X128_FP32),
        )


def test_half_accumulation_is_refused() -> None:
    activation = quantize(torch.ones(1, 128), FP8_1X128_FP32)
    weight = quantize(torch.ones(128, 128), FP8_128X128_FP32)
    with pytest.raises(FormatError, match="float32 or float64"):
        block_scaled_matmul(activation, weight, torch.bfloat16)
