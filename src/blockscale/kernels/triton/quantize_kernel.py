"""The activation quantizer: codes and scales of an (M, K) matrix in one pass over it."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.triton.arithmetic import quantize_blocks
from blockscale.kernels.triton.scales import store_scales


@triton.jit
def start(OVERLAP: tl.constexpr):
    """Wait for the kernel ahead, if launches overlap; then let the one behind start.

    In this order a kernel that reads weights before it waits (``kernels/gluon``) comes after
    everything that was enqueued before this one (programmatic dependent launch, SM90 and later).
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def locate_tile(
    tile,
    columns,
    stored_blocks,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's rows (TILE_ROWS), blocks (BLOCKS) and columns (1, BLOCKS, BLOCK).

    Tiles go along a row first, so that programs that run together read neighbouring memory.
    """
    BLOCKS: tl.constexpr = TILE_COLUMNS // BLOCK
    tiles_across = tl.cdiv(tl.maximum(columns, stored_blocks * BLOCK), TILE_COLUMNS)
    row = tile // tiles_across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first_block = tile % tiles_across * BLOCKS
    block = first_block + tl.arange(0, BLOCKS)
    inside = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, block, (first_block * BLOCK + inside)[None, :, :]


@triton.jit
def store_quantized(
    values,
    codes,
    scales,
    place,
    extents,
    scale_strides,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
):
    """Quantize float32 ``values`` (rows, blocks, BLOCK) and write codes and scales.

    ``place``: what ``locate_tile`` gave. ``extents``: (rows, columns, code rows, stored scale
    rows, stored scale blocks); codes of rows beyond ``rows`` become zero, and so does every
    stored scale without data. ``codes`` is contiguous.
    """
    row, block, column = place
    rows, columns, code_rows, stored_rows, stored_blocks = extents
    quotients, scale_codes = quantize_blocks(values, IS_UE8M0, IS_HALF)
    tl.store(
        codes + row.to(tl.int64)[:, None, None] * columns + column,
        quotients,
        mask=(column < columns) & (row < code_rows)[:, None, None],
    )
    limits = (rows, tl.cdiv(columns, BLOCK), stored_rows, stored_blocks)
    store_scales(scales, scale_codes, row, block, limits, scale_strides, SCALE_KIND)


@triton.jit
def quantize_kernel(
    values,
    codes,
    scales,
    rows,
    columns,
    values_stride,
    code_rows,
    stored_rows,
    stored_blocks,
    scale_row_stride,
    scale_block_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``values`` (rows, columns) with row stride ``values_stride``; see ``store_quantized``."""
    start(OVERLAP)
    row, block, column = locate_tile(
        tl.program_id(0), columns, stored_blocks, TILE_ROWS, TILE_COLUMNS, BLOCK
    )
    loaded = tl.load(
        values + row.to(tl.int64)[:, None, None] * values_stride + column,
        mask=(column < columns) & (row < rows)[:, None, None],
        other=0.0,
    )
    store_quantized(
        loaded.to(tl.float32),
        codes,
        scales,
        (row, block, column),
        (rows, columns, code_rows, stored_rows, stored_blocks),
        (scale_row_stride, scale_block_stride),
        BLOCK,
        IS_UE8M0,
        SCALE_KIND,
        IS_HALF,
    )
