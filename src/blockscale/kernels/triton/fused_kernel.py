"""SiLU-and-multiply, quantized as it is computed, so that it never travels to memory as floats.

Its twin is in ``blockscale.reference.fused``, which says what is rounded where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.arithmetic import rounded_to, silu
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
    IS_HALF: tl.constexpr,
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
        IS_HALF,
    )
