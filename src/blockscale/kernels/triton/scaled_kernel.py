"""The product of operands with UE8M0 scales, which Blackwell's tensor cores apply themselves.

**Unproven**: compiled for sm_100 and compared with the reference in Triton's interpreter, never run
on a GPU. No backend offers it.

The tensor core takes one UE8M0 byte for each 32 elements along K (PTX ISA, ``tcgen05.mma``,
``.kind::mxf8f6f4.block_scale``). A larger block's byte is read once for each of its parts of 32,
which changes no value. Float32 scales cannot go this way: ``gemm_kernel`` promotes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from blockscale.errors import BackendError
from blockscale.kernels.triton.build import TYPES, Variant
from blockscale.kernels.triton.gemm_kernel import tile_position

if TYPE_CHECKING:
    import torch

    from blockscale.formats import BlockShape
    from blockscale.kernels.triton.tiles import Tile

# Elsewhere, and for tiles of fewer rows, Triton turns the codes into 16-bit numbers first and says
# nothing (3.6, read from PTX; tests/kernels_triton/test_blackwell_build.py).
ARCHITECTURES = (100, 103)
LEAST_ROWS = 128
VECTOR = 16
BAND = 8

ONE = tl.constexpr(127)
PART = tl.constexpr(32)
K_STEP = tl.constexpr(128)
E4M3 = tl.constexpr("e4m3")


@triton.jit
def scaled_gemm_kernel(
    activation,
    activation_scales,
    weight,
    weight_scales,
    out,
    m,
    n,
    k,
    activation_scales_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of TILE_M x TILE_N of out = activation x weight^T.

    ``activation`` (m, k) and ``weight`` (n, k): E4M3FN codes, contiguous. Their scales are UE8M0
    bytes: the activation's MN-major, one row per BLOCK_K of K, ``activation_scales_stride`` apart;
    the weight's one per BLOCK_N x BLOCK_K, row-major. ``out`` (m, n) contiguous. Any m, n and k:
    nothing outside is read.
    """
    row_tile, column_tile = tile_position(tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N), BAND)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    columns = column_tile * TILE_N + tl.arange(0, TILE_N)
    read_rows = tl.where(rows < m, rows, 0)
    read_columns = tl.where(columns < n, columns, 0)
    inside = tl.arange(0, K_STEP)
    parts = tl.arange(0, K_STEP // PART) * PART
    blocks = tl.cdiv(k, BLOCK_K)

    a_places = activation + read_rows.to(tl.int64)[:, None] * k + inside[None, :]
    w_places = weight + read_columns.to(tl.int64)[:, None] * k + inside[None, :]
    a_scale_places = activation_scales + read_rows[:, None]
    w_scale_places = weight_scales + (read_columns // BLOCK_N * blocks)[:, None]

    result = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, k, K_STEP):
        in_k = (start + inside < k)[None, :]
        a_tile = tl.load(a_places + start, mask=in_k, other=0.0)
        w_tile = tl.load(w_places + start, mask=in_k, other=0.0)
        # Zeros beyond K stay zeros by a scale of one; by a byte of 255 they would become NaN.
        has_scale = (start + parts < k)[None, :]
        block = ((start + parts) // BLOCK_K)[None, :]
        a_scale = tl.load(
            a_scale_places + block * activation_scales_stride, mask=has_scale, other=ONE
        )
        w_scale = tl.load(w_scale_places + block, mask=has_scale, other=ONE)
        result = tl.dot_scaled(a_tile, a_scale, E4M3, tl.trans(w_tile), w_scale, E4M3, result)

    tl.store(
        out + rows.to(tl.int64)[:, None] * n + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=(rows < m)[:, None] & (columns < n)[None, :],
    )


def scaled_variant(block: BlockShape, tile: Tile, out_dtype: torch.dtype) -> Variant:
    """The kernel for weights in blocks of ``block``; n and k are multiples of 16.

    Raises BackendError for a tile of fewer rows than the scaled product has.
    """
    if tile.rows < LEAST_ROWS or tile.swaps:
        msg = f"the scaled product has {LEAST_ROWS} rows of tokens or more, not {tile}"
        raise BackendError(msg)
    arguments = (
        ("activation", "*fp8e4nv", VECTOR),
        ("activation_scales", "*u8", VECTOR),
        ("weight", "*fp8e4nv", VECTOR),
        ("weight_scales", "*u8", VECTOR),
        ("out", "*" + TYPES[out_dtype], VECTOR),
        ("m", "i32", 1),
        ("n", "i32", VECTOR),
        ("k", "i32", VECTOR),
        ("activation_scales_stride", "i32", VECTOR),
    )
    constants = (
        ("TILE_M", tile.rows),
        ("TILE_N", tile.columns),
        ("BLOCK_N", block.mn),
        ("BLOCK_K", block.k),
        ("BAND", BAND),
    )
    return Variant(scaled_gemm_kernel, arguments, constants, tile.num_warps, tile.num_stages)


def compile_scaled(variant: Variant, architecture: int) -> Any:
    """The compiled kernel; needs no GPU. Raises BackendError where hardware takes no scales."""
    if architecture not in ARCHITECTURES:
        msg = (
            f"tensor cores of sm_{architecture} apply no UE8M0 scales: Triton would multiply in "
            "bfloat16; use the kernel with float32 scales"
        )
        raise BackendError(msg)
    return variant.compile(architecture)
