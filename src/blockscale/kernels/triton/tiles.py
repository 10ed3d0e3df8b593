"""Which tile serves which product: a pure function of its sizes and of the GPU's. No Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockscale.formats import ceil_div

# Token counts up to which one tile is chosen; None is everything above.
TOKEN_BOUNDS: tuple[int | None, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, None)

# Shared memory that one program may use (CUDA C++ programming guide, technical specifications),
# with room left for what Triton adds. Wgmma, which the large tiles are for, exists on SM90 alone.
SHARED_BYTES = {(9, 0): 200 << 10, (10, 0): 200 << 10, (10, 3): 200 << 10}
SMALL_SHARED_BYTES = 90 << 10

# Unaligned rows are copied byte by byte; more than this spills registers (Triton 3.6, sm_90).
MAX_UNALIGNED_ROWS = 64
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` tokens by ``columns`` outputs; ``swaps``: weights take the tensor core's rows."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    swaps: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """What decides a tile: (m, n, k), the weight's block, and the GPU."""

    m: int
    n: int
    k: int
    block_n: int
    block_k: int
    capability: tuple[int, int]
    sm_count: int


# By tokens: tiles, and how many of them there must be at least for one to be taken, in
# multiprocessors; smaller ones keep more of the GPU busy. wgmma has 64 rows, so fewer tokens become
# its columns (``swaps``); 16 by 16 runs on mma.sync, for matrices with too few columns for that.
# From a sweep (benchmarks/triton_sweep.py, H200, 2026-11-23) of this kernel before its scale loads
# were pipelined; not swept again since.
_CHOICES: tuple[tuple[int | None, tuple[tuple[Tile, float], ...]], ...] = (
    (
        16,
        (
            (Tile(16, 64, 8, 8, swaps=True), 0.5),
            (Tile(16, 64, 4, 8, swaps=True), 0.2),
            (Tile(16, 16, 4, 8), 0),
        ),
    ),
    (
        32,
        (
            (Tile(32, 128, 4, 4, swaps=True), 1),
            (Tile(32, 64, 4, 4, swaps=True), 0.5),
            (Tile(16, 64, 4, 4, swaps=True), 0),
        ),
    ),
    (
        64,
        (
            (Tile(64, 64, 4, 4), 1),
            (Tile(32, 128, 4, 4, swaps=True), 0.7),
            (Tile(16, 64, 4, 4, swaps=True), 0),
        ),
    ),
    (
        128,
        (
            (Tile(64, 64, 4, 4), 2),
            (Tile(32, 128, 4, 4, swaps=True), 1),
            (Tile(16, 64, 4, 4, swaps=True), 0),
        ),
    ),
    (
        512,
        ((Tile(64, 128, 8, 3), 1.5), (Tile(64, 64, 4, 4), 1), (Tile(64, 64, 4, 6), 0)),
    ),
    (
        None,
        ((Tile(128, 64, 4, 3), 1.5), (Tile(64, 64, 4, 4), 0)),
    ),
)


def tile_for(product: Product) -> Tile:
    """The measured choice, fitted to the weight's blocks, its alignment and shared memory."""
    _, choices = next(choice for choice in _CHOICES if choice[0] is None or product.m <= choice[0])
    tile = next(
        tile
        for tile, least in choices
        if programs(tile, product.m, product.n) >= least * product.sm_count
    )
    return _fitted(tile, product)


def programs(tile: Tile, m: int, n: int) -> int:
    """How many tiles cover an (m, n) result."""
    return ceil_div(m, tile.rows) * ceil_div(n, tile.columns)


def _fitted(tile: Tile, product: Product) -> Tile:
    """Within one row of weight blocks where blocks are small, and within shared memory."""
    columns = min(tile.columns, max(64, product.block_n))
    rows = tile.rows
    if product.k % ALIGNMENT:
        rows, columns = min(rows, MAX_UNALIGNED_ROWS), min(columns, MAX_UNALIGNED_ROWS)
    if (rows, columns) != (tile.rows, tile.columns):
        tile = replace(tile, rows=rows, columns=columns, num_warps=4)
    limit = SHARED_BYTES.get(product.capability, SMALL_SHARED_BYTES)
    stage = (tile.rows + tile.columns) * product.block_k
    return replace(tile, num_stages=max(2, min(tile.num_stages, limit // stage)))
