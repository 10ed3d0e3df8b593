"""Products over groups in plain Triton: out[rows of g] = activation[rows of g] x weight[g]^T.

Arithmetic and bits are ``gemm_kernel``'s. Which rows belong to which group is read on the GPU; a
program that finds no rows ends at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.gemm_kernel import summed, tile_position


@triton.jit
def grouped_kernel(
    activation,
    activation_scales,
    weight,
    weight_scales,
    routing,
    out,
    slot_rows,
    n,
    k,
    activation_scales_stride,
    alignment,
    row_programs,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    SWAPS: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One column of tiles of TILE_M x TILE_N.

    MASKED: group g has ``routing[g]`` rows at the start of its own ``slot_rows``; a program takes
    every ``row_programs``-th tile of them. Otherwise one slot of all rows, of which every
    ``alignment`` belong to group ``routing[row // alignment]`` or, at -1, to none; TILE_M divides
    ``alignment``, and a program takes one tile. ``activation``: (slots x slot_rows, k), contiguous;
    its scales MN-major, one slot after the other; ``weight`` (groups, n, k) and its scales as in
    ``gemm_kernel``; ``out`` (slots x slot_rows, n).
    """
    columns = tl.cdiv(n, TILE_N)
    blocks = tl.cdiv(k, BLOCK_K)
    if MASKED:
        program = tl.program_id(0)
        column_tile = program // row_programs % columns
        slot = program // (row_programs * columns)
        group = slot
        rows_here = tl.minimum(tl.maximum(tl.load(routing + slot), 0), slot_rows)
        first = program % row_programs
        last = tl.cdiv(rows_here, TILE_M)
        step = row_programs
    else:
        first, column_tile = tile_position(tl.cdiv(slot_rows, TILE_M), columns, BAND)
        slot = 0
        group = tl.load(routing + first * TILE_M // alignment)
        rows_here = slot_rows
        last = tl.where(group >= 0, first + 1, 0)
        group = tl.maximum(group, 0)
        step = 1

    weight_columns = column_tile * TILE_N + tl.arange(0, TILE_N)
    read_columns = tl.where(weight_columns < n, weight_columns, 0)
    inside = tl.arange(0, BLOCK_K)
    group = tl.cast(group, tl.int64)
    slot = tl.cast(slot, tl.int64)
    w_places = weight + (group * n + read_columns)[:, None] * k + inside[None, :]
    scale_columns = column_tile * TILE_N if BLOCK_N % TILE_N == 0 else read_columns
    scale_rows = group * tl.cdiv(n, BLOCK_N) + scale_columns // BLOCK_N
    w_scale_places = weight_scales + scale_rows * blocks
    slot_scales = activation_scales + slot * blocks * activation_scales_stride

    for row_tile in range(first, last, step):
        rows = row_tile * TILE_M + tl.arange(0, TILE_M)
        read_rows = tl.where(rows < rows_here, rows, 0)
        result = summed(
            activation + (slot * slot_rows + read_rows)[:, None] * k + inside[None, :],
            w_places,
            slot_scales + read_rows,
            w_scale_places,
            k,
            activation_scales_stride,
            TILE_M,
            TILE_N,
            BLOCK_N,
            BLOCK_K,
            WHOLE_BLOCKS,
            SWAPS,
            STAGES,
        )
        tl.store(
            out + (slot * slot_rows + rows)[:, None] * n + weight_columns[None, :],
            result.to(out.dtype.element_ty),
            mask=(rows < rows_here)[:, None] & (weight_columns < n)[None, :],
        )
