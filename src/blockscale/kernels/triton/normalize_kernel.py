"""(Add and) RMSNorm, quantized: a whole row in the registers of one program.

Its twin is in ``blockscale.reference.fused``, which says what is rounded where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.quantize_kernel import start
from blockscale.kernels.triton.scales import store_scales
from blockscale.kernels.triton.words import add_words, joined, quantize_words, scaled, squares

WORD_BITS = tl.constexpr(32)


@triton.jit
def pointing_to(pointer, DTYPE: tl.constexpr):
    """The same address, of elements of another type."""
    return pointer.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def load_words(row, word, END: tl.constexpr, COLUMNS: tl.constexpr, PER_WORD: tl.constexpr):
    """Words ``word``, all below END; zeros beyond COLUMNS values.

    ``row`` points to words, or to single halves where a word is none of memory's.
    """
    if row.dtype.element_ty.primitive_bitwidth == WORD_BITS:
        if END * PER_WORD <= COLUMNS:
            return tl.load(row + word)
        else:
            return tl.load(row + word, mask=word < COLUMNS // PER_WORD, other=0)
    else:
        low = tl.load(row + 2 * word, mask=2 * word < COLUMNS, other=0)
        high = tl.load(row + 2 * word + 1, mask=2 * word + 1 < COLUMNS, other=0)
        return joined(low, high)


@triton.jit
def store_words(row, word, words, END: tl.constexpr, COLUMNS: tl.constexpr, PER_WORD: tl.constexpr):
    """The reverse of ``load_words``, for words of values or of codes."""
    BITS: tl.constexpr = row.dtype.element_ty.primitive_bitwidth
    if BITS == words.dtype.primitive_bitwidth:
        if END * PER_WORD <= COLUMNS:
            tl.store(row + word, words)
        else:
            tl.store(row + word, words, mask=word < COLUMNS // PER_WORD)
    else:
        element: tl.constexpr = row.dtype.element_ty
        tl.store(row + 2 * word, words.to(element), mask=2 * word < COLUMNS)
        tl.store(row + 2 * word + 1, (words >> BITS).to(element), mask=2 * word + 1 < COLUMNS)


@triton.jit
def tree_sum(values, SIZE: tl.constexpr, LEFT: tl.constexpr):
    """SIZE float32 values to LEFT, both powers of two: neighbours first, then neighbouring sums.

    Each step reduces an axis of two, so no compiler can choose another order.
    """
    for step in tl.static_range(SIZE.bit_length()):
        if (SIZE >> step) > LEFT:
            values = tl.sum(tl.reshape(values, (SIZE >> (step + 1), 2)), 1)
    return values


@triton.jit
def concatenated(parts, COUNT: tl.constexpr):
    """COUNT tensors (SIZE,), at most four, behind one another; zeros for a third's neighbour.

    In registers: the parts of a thread become its parts of the whole.
    """
    SIZE: tl.constexpr = parts[0].shape[0]
    if COUNT == 1:
        return parts[0]
    elif COUNT == 2:  # noqa: PLR2004 - two tensors
        return tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (1, 0)), (2 * SIZE,))
    else:
        last = parts[COUNT - 1] if COUNT == 4 else tl.zeros_like(parts[0])  # noqa: PLR2004 - four
        whole = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], last))
        return tl.reshape(tl.permute(whole, (2, 1, 0)), (4 * SIZE,))


@triton.jit
def inverse_rms(
    parts,
    epsilon,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """1 / sqrt(mean of squares + epsilon) of a row in TILES tiles of WORDS words.

    Each tile is summed up to SUMS sums, one for each vector of a thread, before tiles are joined.
    """
    sums = ()
    for tile in tl.static_range(TILES):
        square = tl.reshape(squares(parts[tile], DTYPE), (WORDS,))
        sums = sums + (tree_sum(square, WORDS, SUMS),)  # noqa: RUF005 - as above
    PADDED: tl.constexpr = 1 << (TILES - 1).bit_length()
    total = tl.sum(tree_sum(concatenated(sums, TILES), PADDED * SUMS, 1), 0)
    mean = tl.div_rn(total, COLUMNS * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))


@triton.jit
def clear_codes(
    row,
    inside,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Zeros for the codes of a row that is padding."""
    zeros = tl.zeros_like(inside).to(tl.int8 if PER_WORD == 1 else tl.int16)
    for tile in tl.static_range(TILES):
        store_words(row, tile * WORDS + inside, zeros, (tile + 1) * WORDS, COLUMNS, PER_WORD)


@triton.jit
def normalize_quantize_kernel(
    values,
    residual,
    summed,
    weight,
    codes,
    scales,
    rows,
    values_stride,
    residual_stride,
    code_rows,
    stored_rows,
    stored_blocks,
    scale_row_stride,
    scale_block_stride,
    epsilon,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    VECTOR: tl.constexpr,
    PER_LOAD: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """RMSNorm of rows of COLUMNS values, quantized.

    A row is TILES tiles of TILE columns; a tile is (spans of SPAN columns, 2, half a span), so that
    a thread has a vector of each half and few threads share a block, while neighbouring threads
    load neighbouring vectors, VECTOR values each, PER_LOAD in an element of memory. With
    HAS_RESIDUAL, ``residual`` is added first and the sum written to ``summed``, contiguous.

    A program takes one row after another, the next ones' loads under way: with a row a program and
    nothing in flight behind it, 8192 x 7168 ran at half the copy bandwidth (H200, 2026-11-24).
    """
    start(OVERLAP)
    DTYPE: tl.constexpr = values.dtype.element_ty
    PER_WORD: tl.constexpr = 2 if IS_HALF else 1
    WORDS: tl.constexpr = TILE // PER_WORD
    HALF: tl.constexpr = SPAN // PER_WORD // 2
    BLOCKS: tl.constexpr = (1 << (TILES - 1).bit_length()) * TILE // BLOCK
    if PER_LOAD == 2:  # noqa: PLR2004 - halves in pairs
        values, residual = pointing_to(values, tl.int32), pointing_to(residual, tl.int32)
        summed, weight = pointing_to(summed, tl.int32), pointing_to(weight, tl.int32)
        codes = pointing_to(codes, tl.int16)
    else:
        codes = pointing_to(codes, tl.int8)
        if IS_HALF:
            summed = pointing_to(summed, tl.int16)
    inside = tl.arange(0, TILE // SPAN)[:, None, None] * (2 * HALF)
    inside += tl.arange(0, 2)[None, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
    weights = ()
    for tile in tl.static_range(TILES):
        words = load_words(weight, tile * WORDS + inside, (tile + 1) * WORDS, COLUMNS, PER_WORD)
        weights = weights + (words,)  # noqa: RUF005 - Triton unpacks no tuple into another
    block = tl.arange(0, BLOCKS)
    limits = (rows, tl.cdiv(COLUMNS, BLOCK), stored_rows, stored_blocks)
    strides = (scale_row_stride, scale_block_stride)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=AHEAD):
        long_row = tl.cast(row, tl.int64)
        values_row = values + long_row * (values_stride // PER_LOAD)
        residual_row = residual + long_row * (residual_stride // PER_LOAD)
        summed_row = summed + long_row * (COLUMNS // PER_LOAD)
        codes_row = codes + long_row * (COLUMNS // PER_LOAD)
        parts = ()
        for tile in tl.static_range(TILES):
            word = tile * WORDS + inside
            words = load_words(values_row, word, (tile + 1) * WORDS, COLUMNS, PER_WORD)
            if HAS_RESIDUAL:
                added = load_words(residual_row, word, (tile + 1) * WORDS, COLUMNS, PER_WORD)
                words = add_words(words, added, DTYPE)
                store_words(summed_row, word, words, (tile + 1) * WORDS, COLUMNS, PER_WORD)
            parts = parts + (words,)  # noqa: RUF005 - as above
        inverse = inverse_rms(parts, epsilon, TILES, WORDS, TILE // VECTOR, COLUMNS, DTYPE)
        scale_codes = ()
        for tile in tl.static_range(TILES):
            words = scaled(parts[tile], inverse, weights[tile], DTYPE)
            quantized, scale = quantize_words(words, SPAN // 2 // BLOCK, IS_UE8M0, DTYPE)
            store_words(
                codes_row, tile * WORDS + inside, quantized, (tile + 1) * WORDS, COLUMNS, PER_WORD
            )
            scale_codes = scale_codes + (scale,)  # noqa: RUF005 - as above
        every = concatenated(scale_codes, TILES)[None, :]
        store_scales(scales, every, row + tl.arange(0, 1), block, limits, strides, SCALE_KIND)
    tall = tl.maximum(code_rows, stored_rows)
    for row in tl.range(rows + tl.program_id(0), tall, tl.num_programs(0)):
        if row < code_rows:
            codes_row = codes + tl.cast(row, tl.int64) * (COLUMNS // PER_LOAD)
            clear_codes(codes_row, inside, TILES, WORDS, COLUMNS, PER_WORD)
        none = tl.zeros((1, BLOCKS), tl.int32 if IS_UE8M0 else tl.float32)
        store_scales(scales, none, row + tl.arange(0, 1), block, limits, strides, SCALE_KIND)
