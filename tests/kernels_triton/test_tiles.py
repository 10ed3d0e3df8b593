"""Which tile serves which product: pure Python, so it is tested without a GPU or Triton."""

from __future__ import annotations

import pytest

from blockscale.kernels.triton.tiles import (
    SHARED_BYTES,
    SMALL_SHARED_BYTES,
    TOKEN_BOUNDS,
    Product,
    programs,
    tile_for,
)

SIZES = [(64, 128), (576, 7168), (2112, 7168), (7168, 2048), (24576, 1536), (32768, 512)]


def product(m: int, n: int, k: int, **changes: object) -> Product:
    facts = {"block_n": 128, "block_k": 128, "capability": (9, 0), "sm_count": 132, **changes}
    return Product(m, n, k, **facts)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("block_k", [32, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 4096])
def test_stages_fit_into_shared_memory(
    m: int, size: tuple[int, int], block_k: int, capability: tuple[int, int]
) -> None:
    tile = tile_for(product(m, *size, block_k=block_k, capability=capability))
    limit = SHARED_BYTES.get(capability, SMALL_SHARED_BYTES)
    assert tile.num_stages >= 2
    assert tile.num_stages * (tile.rows + tile.columns) * block_k <= limit


def test_narrow_matrices_get_narrower_tiles() -> None:
    wide, narrow = tile_for(product(16, 24576, 1536)), tile_for(product(16, 576, 7168))
    assert wide.columns == 64
    assert programs(narrow, 16, 576) == 36


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("m", [1, 64, 512, 8192])
def test_more_multiprocessors_never_get_larger_tiles(size: tuple[int, int], m: int) -> None:
    few, many = (tile_for(product(m, *size, sm_count=count)) for count in (24, 132))
    assert many.rows * many.columns <= few.rows * few.columns


def test_small_weight_blocks_get_tiles_within_one_row_of_blocks() -> None:
    for m in (32, 512, 8192):
        assert tile_for(product(m, 32768, 4096, block_n=64)).columns == 64


def test_unaligned_rows_get_small_tiles() -> None:
    tile = tile_for(product(8192, 4096, 333))
    assert max(tile.rows, tile.columns) <= 64


def test_bounds_rise_and_end_open() -> None:
    *bounds, last = TOKEN_BOUNDS
    assert last is None
    assert bounds == sorted(bounds)
