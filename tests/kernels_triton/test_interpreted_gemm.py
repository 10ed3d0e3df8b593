"""The GEMM kernel on integers, whose sums are exact in any order, and on normal data."""

from __future__ import annotations

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
from blockscale.kernels.triton.tiles import TOKEN_BOUNDS, Tile
from blockscale.reference import block_scaled_matmul, quantize, relayout
from blockscale.tensor import BlockScaledTensor

pytestmark = pytest.mark.usefixtures("interpreted")

TILES = [
    Tile(16, 64, 4, 2, swaps=True),
    Tile(16, 16, 4, 2),
    Tile(32, 32, 4, 2),
    Tile(64, 128, 4, 2),
]


def with_powers(data: torch.Tensor, block: BlockShape, seed: int) -> BlockScaledTensor:
    """Codes that are ``data`` and scales that are powers of two, all different along K."""
    fmt = BlockFormat(E4M3FN, ScaleFormat.FP32, block)
    grid = block.grid(*data.shape)
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** torch.randint(-3, 4, grid, generator=generator)
    return BlockScaledTensor(data.to(torch.float8_e4m3fn), scales, fmt, K_MAJOR)


def operands(m: int, n: int, k: int, block: BlockShape) -> tuple[BlockScaledTensor, ...]:
    generator = torch.Generator().manual_seed(m + n + k)
    left = torch.randint(-4, 5, (m, k), generator=generator).float()
    right = torch.randint(-4, 5, (n, k), generator=generator).float()
    return with_powers(left, BlockShape(1, block.k), 1), with_powers(right, block, 2)


def product_of(
    activation: BlockScaledTensor,
    weight: BlockScaledTensor,
    tile: Tile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from blockscale.kernels.triton.product import TritonProduct

    product = TritonProduct(weight, [tile] * len(TOKEN_BOUNDS))
    product(relayout(activation, MN_MAJOR_TMA_ALIGNED), out, bias)
    return out


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (32, 32)], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 16, 128), (7, 77, 333), (33, 192, 512), (65, 130, 140)], ids=str
)
def test_integers_are_exact(tile: Tile, block: tuple[int, int], size: tuple[int, int, int]) -> None:
    m, n, k = size
    activation, weight = operands(m, n, k, BlockShape(*block))
    out = torch.full((m, n), float("nan"))
    found = product_of(activation, weight, tile, out)
    assert torch.equal(found, block_scaled_matmul(activation, weight, torch.float64).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_is_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    activation, weight = operands(5, 48, 256, BlockShape(128, 128))
    bias = (torch.arange(48) / 7).to(dtype)
    out = torch.full((5, 48), float("nan"), dtype=dtype)
    found = product_of(activation, weight, TILES[0], out, bias)
    exact = block_scaled_matmul(activation, weight, torch.float32) + bias.float()
    assert torch.equal(found, exact.to(dtype))


def test_nothing_outside_the_result_is_written() -> None:
    activation, weight = operands(3, 40, 128, BlockShape(128, 128))
    whole = torch.full((3 * 40 + 64,), 7.0)
    product_of(activation, weight, TILES[0], whole[32:-32].view(3, 40))
    assert (whole[:32] == 7).all()
    assert (whole[-32:] == 7).all()


def test_padding_of_scales_is_not_read() -> None:
    activation, weight = operands(5, 32, 256, BlockShape(128, 128))
    moved = relayout(activation, MN_MAJOR_TMA_ALIGNED)
    memory = torch.tensor([]).set_(moved.scales.untyped_storage())
    memory.view(2, 8)[:, 5:] = float("nan")
    out = torch.full((5, 32), float("nan"))
    found = product_of(moved, weight, TILES[0], out)
    assert torch.equal(found, block_scaled_matmul(activation, weight))


def test_values_written_into_the_weight_later_are_served() -> None:
    from blockscale.kernels.triton.product import TritonProduct

    activation, weight = operands(4, 32, 128, BlockShape(128, 128))
    _, other = operands(4, 32, 128, BlockShape(128, 128))
    product = TritonProduct(weight, [TILES[0]] * len(TOKEN_BOUNDS))
    weight.data.copy_(other.data.float().neg().to(torch.float8_e4m3fn))
    weight.scales.mul_(2)
    out = torch.empty(4, 32)
    product(relayout(activation, MN_MAJOR_TMA_ALIGNED), out, None)
    assert torch.equal(out, block_scaled_matmul(activation, weight))


def test_normal_data_is_within_float32_sums() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = quantize(torch.randn(64, 512, generator=generator), _format(128, 128))
    activation = quantize(torch.randn(9, 512, generator=generator), _format(1, 128))
    exact = block_scaled_matmul(activation, weight, torch.float64)
    found = product_of(activation, weight, TILES[0], torch.empty(9, 64))
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-6


def _format(mn: int, k: int) -> BlockFormat:
    return BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(mn, k))
