"""The block-scaled product: out = activation x weight^T (+ bias), any M, N and K.

A program computes one tile. For each scale block along K the tensor core sums its products in
float32; the sum is then scaled and added to the result with one FMA per element::

    result += products * (activation_scale[row, block] * weight_scale[column, block])

so every element is the same chain of operations, whatever the tile. Nothing beyond M, N or K is
read: rows and columns outside are read from the first row and their results dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(row_tiles, column_tiles, BAND: tl.constexpr):
    """This program's tile: down the rows of a band, then to the next column.

    Tiles that run at the same time then share rows of A and columns of B in L2.
    """
    tile = tl.program_id(0)
    band = tile // (column_tiles * BAND)
    rows = tl.minimum(row_tiles - band * BAND, BAND)
    inside = tile % (column_tiles * BAND)
    return band * BAND + inside % rows, inside // rows


@triton.jit
def promoted(
    result,
    a_tile,
    w_tile,
    a_scale,
    w_scale,
    SWAPS: tl.constexpr,
    HAS_ONE_WEIGHT_SCALE: tl.constexpr,
):
    """``result`` plus the scaled products of one block along K."""
    if SWAPS:
        products = tl.dot(w_tile, tl.trans(a_tile))
        if HAS_ONE_WEIGHT_SCALE:
            scale = (a_scale * w_scale)[None, :]
        else:
            scale = a_scale[None, :] * w_scale[:, None]
    else:
        products = tl.dot(a_tile, tl.trans(w_tile))
        if HAS_ONE_WEIGHT_SCALE:
            scale = (a_scale * w_scale)[:, None]
        else:
            scale = a_scale[:, None] * w_scale[None, :]
    return result + products * scale


@triton.jit
def summed(
    a_places,
    w_places,
    a_scale_places,
    w_scale_places,
    k,
    activation_scales_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    SWAPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The (TILE_M, TILE_N) float32 sums over all of K; the places are those of its first block."""
    inside = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(k, BLOCK_K)
    SHAPE: tl.constexpr = (TILE_N, TILE_M) if SWAPS else (TILE_M, TILE_N)
    result = tl.zeros(SHAPE, tl.float32)
    # With its stages named here, Triton pipelines the loads of scales too; otherwise only those
    # that feed the tensor core, and every block would wait for its scales (0.4 us on an H200).
    for block in tl.range(blocks, num_stages=STAGES):
        a_scale = tl.load(a_scale_places + block * activation_scales_stride)
        w_scale = tl.load(w_scale_places + block)
        if WHOLE_BLOCKS:
            a_tile = tl.load(a_places)
            w_tile = tl.load(w_places)
        else:
            in_k = (block * BLOCK_K + inside < k)[None, :]
            a_tile = tl.load(a_places, mask=in_k, other=0.0)
            w_tile = tl.load(w_places, mask=in_k, other=0.0)
        a_places += BLOCK_K
        w_places += BLOCK_K
        result = promoted(result, a_tile, w_tile, a_scale, w_scale, SWAPS, BLOCK_N % TILE_N == 0)

    return tl.trans(result) if SWAPS else result


@triton.jit
def gemm_kernel(
    activation,
    activation_scales,
    weight,
    weight_scales,
    bias,
    out,
    m,
    n,
    k,
    activation_stride,
    activation_scales_stride,
    has_bias,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    SWAPS: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of TILE_M x TILE_N.

    ``activation`` (m, k) with row stride ``activation_stride``, its scales MN-major: one row per
    block along K, ``activation_scales_stride`` apart. ``weight`` (n, k) and its scales, one per
    BLOCK_N x BLOCK_K, row-major. ``out`` (m, n) contiguous. ``bias`` (n) is read if ``has_bias``.
    WHOLE_BLOCKS: BLOCK_K divides k. SWAPS: the weight takes the rows of the tensor-core product,
    for tiles of few tokens. STAGES: blocks that are on their way from memory at once.
    """
    row_tile, column_tile = tile_position(tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N), BAND)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    columns = column_tile * TILE_N + tl.arange(0, TILE_N)
    read_rows = tl.where(rows < m, rows, 0)
    read_columns = tl.where(columns < n, columns, 0)
    inside = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(k, BLOCK_K)

    a_places = activation + read_rows.to(tl.int64)[:, None] * activation_stride + inside[None, :]
    w_places = weight + read_columns.to(tl.int64)[:, None] * k + inside[None, :]
    a_scale_places = activation_scales + read_rows
    # Where the whole tile lies in one row of blocks, its weight scale is one number.
    scale_columns = column_tile * TILE_N if BLOCK_N % TILE_N == 0 else read_columns
    w_scale_places = weight_scales + (scale_columns // BLOCK_N) * blocks

    result = summed(
        a_places,
        w_places,
        a_scale_places,
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
    addend = tl.load(bias + columns, mask=(columns < n) & (has_bias != 0), other=0.0)
    result += addend.to(tl.float32)[None, :]
    tl.store(
        out + rows.to(tl.int64)[:, None] * n + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=(rows < m)[:, None] & (columns < n)[None, :],
    )
