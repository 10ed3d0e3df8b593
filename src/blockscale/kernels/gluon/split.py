"""Device code: pieces of a split sum, added in the order of the pieces whoever comes last.

Each piece of a tile writes its float32 sums to the workspace and draws a ticket. The one that draws
the last ticket adds up all pieces, from the first to the last, so that the result has the same bits
on every run. It also sets the tickets back to zero for the next launch.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockscale.kernels.gluon.dialect import partition_barrier

# 128 registers of each of a consumer's 128 threads.
ELEMENTS_AT_ONCE = gl.constexpr(128 * 128)


@gluon.jit
def piece_offsets(ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the elements of a (ROWS, COLUMNS) tensor lie inside its part of the workspace."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.expand_dims(rows, 1) * COLUMNS + gl.expand_dims(columns, 0)


@gluon.jit
def draw_ticket(tickets):
    """The number of pieces that came before this one; what all of them wrote can then be read."""
    # The barrier orders the other threads' stores before the one thread's release.
    partition_barrier()
    return gl.atomic_add(tickets, 1, sem="acq_rel", scope="gpu")


@gluon.jit
def add_pieces(first, piece_stride, pieces, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
               LAYOUT: gl.constexpr):  # fmt: skip
    """The sum over all pieces; ``first`` points at the first one, ``piece_stride`` to the next.

    Several pieces are under way at once, as far as registers allow: each is a trip to L2.
    """
    AT_ONCE: gl.constexpr = max(1, min(8, ELEMENTS_AT_ONCE // (ROWS * COLUMNS)))
    offsets = piece_offsets(ROWS, COLUMNS, LAYOUT)
    total = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    for piece in range(0, pieces, AT_ONCE):
        loaded = ()
        for ahead in gl.static_range(AT_ONCE):
            # .cg: past L1, where another multiprocessor's stores are not seen.
            pointers = first + (piece + ahead) * piece_stride + offsets
            there = gl.full((ROWS, COLUMNS), piece + ahead, gl.int32, LAYOUT) < pieces
            value = gl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
            loaded = loaded + (value,)  # noqa: RUF005 - Gluon has no unpacking
        for ahead in gl.static_range(AT_ONCE):
            total += loaded[ahead]
    return total
