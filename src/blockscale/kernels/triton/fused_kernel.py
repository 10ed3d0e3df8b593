"""Kernels that quantize what they compute, so that it never travels to memory as floats.

Their twins are in ``blockscale.reference.fused``, which says what is rounded where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.arithmetic import pairwise_sum, rounded_to, silu
from blockscale.kernels.triton.quantize_kernel import locate_tile, start, store_quantized


@triton.jit
def silu_multiply_quantize_kernel(
    gate_up,
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
    CORRECTIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """silu(gate) * up of ``gate_up`` (rows, 2 columns), quantized as (rows, columns)."""
    start(OVERLAP)
    row, block, column = locate_tile(
        tl.program_id(0), columns, stored_blocks, TILE_ROWS, TILE_COLUMNS, BLOCK
    )
    places = gate_up + row.to(tl.int64)[:, None, None] * values_stride + column
    is_data = (column < columns) & (row < rows)[:, None, None]
    gate = tl.load(places, mask=is_data, other=0.0).to(tl.float32)
    up = tl.load(places + columns, mask=is_data, other=0.0).to(tl.float32)
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    product = rounded_to(rounded_to(silu(gate), DTYPE) * up, DTYPE)
    store_quantized(
        product,
        codes,
        scales,
        (row, block, column),
        (rows, columns, code_rows, stored_rows, stored_blocks),
        (scale_row_stride, scale_block_stride),
        BLOCK,
        IS_UE8M0,
        SCALE_KIND,
        CORRECTIONS,
    )


@triton.jit
def normalize_quantize_kernel(
    values,
    residual,
    summed,
    weight,
    codes,
    scales,
    rows,
    columns,
    values_stride,
    residual_stride,
    code_rows,
    stored_rows,
    stored_blocks,
    scale_row_stride,
    scale_block_stride,
    epsilon,
    TILE_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    CORRECTIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """RMSNorm of rows, quantized. TILE_COLUMNS = 2**STEPS holds a whole row.

    With HAS_RESIDUAL, ``residual`` is added first and the sum written to ``summed``, contiguous.
    A program takes one row after another, the next ones' loads under way: with a row a program and
    nothing in flight behind it, 8192 x 7168 ran at half the copy bandwidth (H200, 2026-11-24).
    """
    start(OVERLAP)
    _row, _block, column = locate_tile(0, columns, stored_blocks, 1, TILE_COLUMNS, BLOCK)
    in_row = column < columns
    factor = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    DTYPE: tl.constexpr = values.dtype.element_ty
    tall = tl.maximum(code_rows, stored_rows)
    for tile in tl.range(tl.program_id(0), tall, tl.num_programs(0), num_stages=AHEAD):
        row, block, column = locate_tile(tile, columns, stored_blocks, 1, TILE_COLUMNS, BLOCK)
        long_row = row.to(tl.int64)[:, None, None]
        is_data = in_row & (row < rows)[:, None, None]
        wide = tl.load(values + long_row * values_stride + column, mask=is_data, other=0.0)
        wide = wide.to(tl.float32)
        if HAS_RESIDUAL:
            added = tl.load(residual + long_row * residual_stride + column, mask=is_data, other=0.0)
            total = (wide + added.to(tl.float32)).to(DTYPE)
            tl.store(summed + long_row * columns + column, total, mask=is_data)
            wide = total.to(tl.float32)
        square = tl.reshape(wide * wide, (TILE_COLUMNS,))
        mean = tl.div_rn(pairwise_sum(square, TILE_COLUMNS, STEPS), columns.to(tl.float32))
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
        normalized = rounded_to(rounded_to(wide * inverse, DTYPE) * factor, DTYPE)
        store_quantized(
            normalized,
            codes,
            scales,
            (row, block, column),
            (rows, columns, code_rows, stored_rows, stored_blocks),
            (scale_row_stride, scale_block_stride),
            BLOCK,
            IS_UE8M0,
            SCALE_KIND,
            CORRECTIONS,
        )
