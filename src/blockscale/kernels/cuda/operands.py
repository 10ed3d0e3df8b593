"""The operands of one product as ``gemm.cu`` takes them: descriptors, and the problem's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockscale.kernels.cuda import driver
from blockscale.kernels.cuda.launch import Arguments, Problem
from blockscale.kernels.cuda.work import SCALE_BYTES, aligned_scale_stride

if TYPE_CHECKING:
    from blockscale.kernels.cuda.driver import Maps
    from blockscale.kernels.cuda.work import Work
    from blockscale.tensor import BlockScaledTensor

# Type and promotion into L2: codes come from memory, 128 bytes of a row at a time (perf-log G14).
CODES = driver.UINT8, driver.PROMOTE_256
SCALES = driver.FLOAT32, driver.PROMOTE_NOTHING
RESULTS = {
    torch.bfloat16: (driver.BFLOAT16, driver.PROMOTE_NOTHING),
    torch.float16: (driver.FLOAT16, driver.PROMOTE_NOTHING),
    torch.float32: (driver.FLOAT32, driver.PROMOTE_NOTHING),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """An activation and its result, by address.

    ``shape``: (rows,), or (slots, rows). ``pitch``: bytes from one row of codes to the next.
    """

    shape: tuple[int, ...]
    codes: int
    pitch: int
    scales: int
    out: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Routing:
    """Whose rows they are, of a stack of weights.

    ``block_rows``: of a row block, 0 for slots. ``address``: each block's group, or slots' counts.
    """

    block_rows: int
    groups: int
    address: int


# One weight: all rows are its own.
NO_ROUTING = Routing(0, 0, 0)


def arguments(
    maps: Maps,
    weight: BlockScaledTensor,
    work: Work,
    rows: Rows,
    *,
    bias: int = 0,
    routing: Routing = NO_ROUTING,
) -> Arguments:
    """``bias``: its address, or 0. Raises BackendError if TMA cannot reach an operand."""
    *slots, m = rows.shape
    count = math.prod(slots)
    n, k = weight.data.shape[-2:]
    stack = (weight.data.data_ptr(), (weight.data.numel() // k, k), weight.data.stride(-2))
    codes = (rows.codes, (count * m, k), rows.pitch)
    columns = aligned_scale_stride(m) * SCALE_BYTES
    scales = (rows.scales, (count * work.k_blocks, m), columns)
    result = (rows.out, (*slots, m, n), n * rows.dtype.itemsize)
    a_box, last_box, b_box, scale_box, last_scale_box, out_box = work.boxes
    described = (
        maps(*codes, a_box, *CODES),
        maps(*codes, last_box, *CODES),
        maps(*stack, b_box, *CODES),
        maps(*scales, scale_box, *SCALES),
        maps(*scales, last_scale_box, *SCALES),
        maps(*result, out_box, *RESULTS[rows.dtype]),
    )
    problem = Problem(
        weight.scales.data_ptr(),
        bias or None,
        rows.out,
        m,
        n,
        work.k_blocks,
        weight.scales.stride(-2),
        work.unit_rows,
        work.unit_columns,
        work.band,
        work.last_rows,
        work.early_blocks,
        routing.block_rows,
        routing.groups,
        routing.address or None,
    )
    return Arguments(described, problem)
