"""Device code: from float32 results to the output: bias, rounding, staging, TMA stores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from blockscale.kernels.gluon.dialect import (
    number_in_pair,
    seen_as,
    store_box,
    whole_in_each_program,
)
from blockscale.kernels.gluon.waves import WAVE_ROWS, wave_layout


@gluon.jit
def _halves(values, COLUMNS: gl.constexpr):
    """The left and the right half of the columns; both stay in the registers they are in."""
    parts = gl.permute(gl.reshape(values, (WAVE_ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    left, right = gl.split(parts)
    HALF: gl.constexpr = wave_layout(COLUMNS // 2, gl.num_ctas())
    left = gl.convert_layout(left, HALF, assert_trivial=True)
    right = gl.convert_layout(right, HALF, assert_trivial=True)
    return left, right


@gluon.jit
def _store(values, out, staging, buffer, row, column, ME: gl.constexpr, COLUMNS: gl.constexpr,
           BUFFERS: gl.constexpr):  # fmt: skip
    """Start the store of one wave's rows and as many columns as a buffer has, or fewer.

    Triton lets one program of a cluster store what all of them have. So a pair's buffers are
    declared as one of twice the rows, half of it in each program, and TMA gets the row that the
    whole would start in.
    """
    target = staging.index(ME * BUFFERS + buffer)
    own = target
    if gl.num_ctas() > 1:
        WHOLE: gl.constexpr = whole_in_each_program(staging.layout, gl.num_ctas())
        own = seen_as(target, [WAVE_ROWS, staging.shape[2]], WHOLE)
        row -= number_in_pair() * WAVE_ROWS
    # Stores are issued in the order of the buffers: this buffer's last one has been read.
    tma.store_wait(BUFFERS - 1)
    own.slice(0, COLUMNS, dim=1).store(values)
    fence_async_shared()
    store_box(out, [row, column], target)
    return (buffer + 1) % BUFFERS


@gluon.jit
def write(result, out, staging, buffer, bias, has_bias, row, column, n, ME: gl.constexpr,
          COLUMNS: gl.constexpr, BUFFERS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Add the bias, round to the output's dtype and start the stores of one wave's rows.

    Consumer ``ME`` has ``BUFFERS`` staging buffers of half or all of COLUMNS; ``buffer`` is
    the next of them. Returns the one after.
    """
    AT_ONCE: gl.constexpr = staging.shape[2]
    if has_bias != 0:
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        added = gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)
        result += gl.expand_dims(added, 0)
    rounded = result.to(out.dtype)
    if COLUMNS <= AT_ONCE:
        buffer = _store(rounded, out, staging, buffer, row, column, ME, COLUMNS, BUFFERS)
    else:
        HALF: gl.constexpr = COLUMNS // 2
        left, right = _halves(rounded, COLUMNS)
        buffer = _store(left, out, staging, buffer, row, column, ME, HALF, BUFFERS)
        buffer = _store(right, out, staging, buffer, row, column + HALF, ME, HALF, BUFFERS)
    return buffer
