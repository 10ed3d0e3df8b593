"""The kernel with UE8M0 scales: the right scale for each part, ragged edges, nothing outside.

The interpreter of Triton 3.6 has no scaled product; what stands in is the definition of the OCP MX
specification. So these tests cover the kernel's own work, not the tensor core's arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blockscale.formats import (
    E4M3FN,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockFormat,
    BlockShape,
    ScaleFormat,
)
from blockscale.kernels.triton.tiles import Tile
from blockscale.reference import block_scaled_matmul, relayout
from blockscale.tensor import BlockScaledTensor

pytestmark = pytest.mark.usefixtures("interpreted", "scaled_products")

BLOCKS = [BlockShape(128, 128), BlockShape(32, 32), BlockShape(1, 128), BlockShape(1, 32)]


@pytest.fixture
def scaled_products(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Gives the interpreter ``dot_scaled`` of E4M3 operands with UE8M0 scales."""
    from triton.runtime import interpreter

    def values(codes: Any, scales: np.ndarray) -> np.ndarray:
        held = torch.from_numpy(np.ascontiguousarray(codes.data).view(np.uint8))
        numbers = held.view(torch.float8_e4m3fn).double().numpy()
        factors = np.where(scales == 255, np.nan, np.exp2(scales.astype(np.float64) - 127))
        return numbers * np.repeat(factors, 32, axis=1)

    def create_dot_scaled(*arguments: Any) -> object:
        _, left, left_scales, _, right, right_scales, _, _, _, _, total = arguments
        a = values(left, left_scales.data)
        b = values(interpreter.TensorHandle(right.data.T, right.dtype), right_scales.data)
        return interpreter.TensorHandle(
            (a @ b.T + total.data).astype(np.float32), total.dtype.scalar
        )

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot_scaled", create_dot_scaled, raising=False)


def operand(rows: int, k: int, block: BlockShape, seed: int) -> BlockScaledTensor:
    """Small whole numbers and scales of 2**-3 to 2**3, all different along K."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, (rows, k), generator=generator).to(torch.float8_e4m3fn)
    grid = block.grid(rows, k)
    scales = torch.randint(124, 131, grid, generator=generator, dtype=torch.uint8)
    fmt = BlockFormat(E4M3FN, ScaleFormat.UE8M0, block)
    return BlockScaledTensor(data, scales.view(torch.float8_e8m0fnu), fmt, K_MAJOR)


def product_of(activation: BlockScaledTensor, weight: BlockScaledTensor) -> torch.Tensor:
    """The kernel's result, with 64 elements of 7 on each side of it."""
    from blockscale.kernels.triton.scaled_kernel import scaled_variant

    (m, k), n = activation.data.shape, weight.data.shape[0]
    variant = scaled_variant(weight.format.block, Tile(128, 64, 4, 2), torch.float32)
    moved = relayout(activation, MN_MAJOR_TMA_ALIGNED)
    whole = torch.full((m * n + 128,), 7.0)
    programs = -(-m // 128) * -(-n // 64)
    variant.kernel[(programs,)](
        moved.data,
        moved.scales.view(torch.uint8),
        weight.data,
        weight.scales.view(torch.uint8),
        whole[64:],
        m,
        n,
        k,
        moved.scales.stride(1),
        **dict(variant.constants),
    )
    return whole


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("size", [(1, 16, 128), (130, 80, 352), (3, 144, 512)], ids=str)
def test_integers_are_exact(block: BlockShape, size: tuple[int, int, int]) -> None:
    m, n, k = size
    activation = operand(m, k, BlockShape(1, block.k), 1)
    weight = operand(n, k, block, 2)
    whole = product_of(activation, weight)
    expected = block_scaled_matmul(activation, weight, torch.float64).float()
    assert torch.equal(whole[64:-64].view(m, n), expected)
    assert (whole[:64] == 7).all()
    assert (whole[-64:] == 7).all()


def test_a_scale_of_nan_reaches_its_row_alone() -> None:
    activation = operand(3, 256, BlockShape(1, 128), 1)
    weight = operand(32, 256, BlockShape(128, 128), 2)
    activation.scales.view(torch.uint8)[1, 1] = 255
    found = product_of(activation, weight)[64:-64].view(3, 32)
    assert found.isnan().sum(1).tolist() == [0, 32, 0]
