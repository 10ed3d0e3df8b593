"""Device code: scale codes from registers into the memory of any ``ScaleLayout``, padding zeroed.

``ScaleWriter`` of ``activations`` turns a layout into these constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.formats.layout import (
    EXPONENTS_PER_WORD,
    SWIZZLE_TILE_COLUMNS,
    SWIZZLE_TILE_ROWS,
)

# How a scale lies: float32 or bytes under two strides, four bytes to an int32, or tiles of bytes.
STRIDED = tl.constexpr(0)
PACKED = tl.constexpr(1)
SWIZZLED = tl.constexpr(2)

WORD_BYTES = tl.constexpr(EXPONENTS_PER_WORD)
TILE_ROWS = tl.constexpr(SWIZZLE_TILE_ROWS)
TILE_COLUMNS = tl.constexpr(SWIZZLE_TILE_COLUMNS)
# Rows of a swizzled tile that lie 16 bytes apart; the tile has four such groups.
GROUP_ROWS = tl.constexpr(32)
GROUP_BYTES = tl.constexpr(16)


@triton.jit
def store_scales(pointer, codes, row, block, limits, strides, KIND: tl.constexpr):
    """Write scale codes (rows, blocks) at grid positions ``row`` x ``block``.

    ``limits``: (rows of data, blocks of data, stored rows, stored blocks); what is stored beyond
    the data becomes zero. ``strides``: (of a row, of a block or word), in stored elements; for
    tiles (unused, tiles across). Packed codes need a multiple of four blocks, starting at one.
    """
    rows, blocks, stored_rows, stored_blocks = limits
    row_stride, block_stride = strides
    is_data = (row < rows)[:, None] & (block < blocks)[None, :]
    codes = tl.where(is_data, codes, tl.zeros_like(codes))
    row = row.to(tl.int64)
    if KIND == PACKED:
        ROWS: tl.constexpr = codes.shape[0]
        WORDS: tl.constexpr = codes.shape[1] // WORD_BYTES
        shifted = codes << ((block % WORD_BYTES) * 8)[None, :]
        words = tl.sum(tl.reshape(shifted, (ROWS, WORDS, WORD_BYTES)), 2)
        word = tl.min(tl.reshape(block, (WORDS, WORD_BYTES)), 1) // WORD_BYTES
        places = row[:, None] * row_stride + word[None, :].to(tl.int64) * block_stride
        is_stored = (row < stored_rows)[:, None] & (word < stored_blocks)[None, :]
        tl.store(pointer + places, words, mask=is_stored)
    else:
        is_stored = (row < stored_rows)[:, None] & (block < stored_blocks)[None, :]
        if KIND == SWIZZLED:
            tile = (row // TILE_ROWS)[:, None] * block_stride + (block // TILE_COLUMNS)[None, :]
            inside = (row % GROUP_ROWS) * GROUP_BYTES
            inside += (row % TILE_ROWS) // GROUP_ROWS * TILE_COLUMNS
            places = tile * (TILE_ROWS * TILE_COLUMNS) + inside[:, None]
            places += (block % TILE_COLUMNS)[None, :]
        else:
            places = row[:, None] * row_stride + block[None, :].to(tl.int64) * block_stride
        tl.store(pointer + places, codes.to(pointer.dtype.element_ty), mask=is_stored)
