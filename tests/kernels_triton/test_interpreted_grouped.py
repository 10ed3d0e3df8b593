"""The grouped kernel on integers, whose sums are exact in any order."""

from __future__ import annotations

import pytest
import torch

from blockscale.errors import BackendError
from blockscale.formats import (
    E4M3FN,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockFormat,
    BlockShape,
    ScaleFormat,
)
from blockscale.kernels.triton.tiles import Tile
from blockscale.reference import contiguous_matmul, masked_matmul
from blockscale.tensor import BlockScaledTensor, as_stored

pytestmark = pytest.mark.usefixtures("interpreted")

TILES = [Tile(16, 64, 4, 2, swaps=True), Tile(16, 16, 4, 2), Tile(64, 64, 4, 2)]
NAN = float("nan")


def weights(groups: int, n: int, k: int, block: BlockShape) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-4, 5, (groups, n, k), generator=generator).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-3, 4, (groups, *block.grid(n, k)), generator=generator)
    return BlockScaledTensor(codes, scales, BlockFormat(E4M3FN, ScaleFormat.FP32, block), K_MAJOR)


def activation(valid: torch.Tensor, k: int, block_k: int) -> BlockScaledTensor:
    """Whole numbers where ``valid``, a mask of rows; NaN in all other rows and in padding."""
    fmt = BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(1, block_k))
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-4, 5, (*valid.shape, k), generator=generator).float()
    codes[~valid] = NAN
    stored = MN_MAJOR_TMA_ALIGNED.stored(valid.shape[-1], k, fmt)
    leading = tuple(valid.shape[:-1])
    flat = torch.full((stored.elements * (leading[0] if leading else 1),), NAN)
    scales = as_stored(flat, stored, leading)
    powers = 2.0 ** torch.randint(-3, 4, scales.shape, generator=generator)
    scales[valid] = powers[valid]
    data = codes.to(torch.float8_e4m3fn)
    return BlockScaledTensor(data, scales, fmt, MN_MAJOR_TMA_ALIGNED)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (32, 32)], ids=str)
@pytest.mark.parametrize("counts", [(0, 1, 40, 0, 17), (0, 0, 0, 0, 0)], ids=str)
def test_masked_is_exact_and_writes_no_other_row(
    tile: Tile, block: tuple[int, int], counts: tuple[int, ...]
) -> None:
    from blockscale.kernels.triton.grouped_product import GroupedTritonProduct

    weight = weights(5, 77, 333, BlockShape(*block))
    slot = 41
    valid = torch.arange(slot) < torch.tensor(counts)[:, None]
    rows = activation(valid, 333, block[1])
    out = torch.full((5, slot, 77), NAN)
    number = torch.tensor(counts, dtype=torch.int32)
    GroupedTritonProduct(weight, tile).masked(rows, number, out, 16)
    expected = masked_matmul(rows, weight, number, torch.float64).float()
    assert torch.equal(out[valid], expected[valid])
    assert out[~valid].isnan().all()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("alignment", [16, 64])
@pytest.mark.parametrize("experts", [(0, 1, 1, 4, -1), (2,), (-1, -1)], ids=str)
def test_contiguous_is_exact_and_writes_no_other_row_block(
    tile: Tile, alignment: int, experts: tuple[int, ...]
) -> None:
    from blockscale.kernels.triton.grouped_product import GroupedTritonProduct

    weight = weights(5, 77, 333, BlockShape(128, 128))
    groups = torch.tensor(experts, dtype=torch.int32)
    valid = (groups >= 0).repeat_interleave(alignment)
    # The last rows of every block are padding.
    valid &= torch.arange(valid.numel()) % alignment < alignment - 3
    rows = activation(valid, 333, 128)
    out = torch.full((valid.numel(), 77), NAN, dtype=torch.bfloat16)
    GroupedTritonProduct(weight, tile).contiguous(rows, groups, out)
    expected = contiguous_matmul(rows, weight, groups, torch.float64).bfloat16()
    assert torch.equal(out[valid], expected[valid])
    assert out[~valid].isnan().all()


def test_counts_beyond_the_slot_or_below_zero_are_taken_for_full_and_empty() -> None:
    from blockscale.kernels.triton.grouped_product import GroupedTritonProduct

    weight = weights(3, 32, 128, BlockShape(128, 128))
    rows = activation(torch.ones(3, 20, dtype=torch.bool), 128, 128)
    out = torch.full((3, 20, 32), NAN)
    numbers = torch.tensor([999, -5, 3], dtype=torch.int32)
    GroupedTritonProduct(weight, TILES[0]).masked(rows, numbers, out, 1)
    full = torch.tensor([20, 0, 3], dtype=torch.int32)
    expected = masked_matmul(rows, weight, full, torch.float64).float()
    assert torch.equal(out[0], expected[0])
    assert out[1].isnan().all()
    assert torch.equal(out[2, :3], expected[2, :3])


def test_row_blocks_that_no_tile_divides_are_refused() -> None:
    from blockscale.kernels.triton.grouped_product import GroupedTritonProduct

    weight = weights(2, 32, 128, BlockShape(128, 128))
    rows = activation(torch.ones(20, dtype=torch.bool), 128, 128)
    groups = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(BackendError, match="20 rows in 2 blocks"):
        GroupedTritonProduct(weight, TILES[0]).contiguous(rows, groups, torch.empty(20, 32))
