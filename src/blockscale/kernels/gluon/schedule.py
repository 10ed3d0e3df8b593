"""Device code: the order of tiles and of pipeline slots. Every partition walks both alike."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A narrow tile has half the columns of a full one and takes half its time.
NARROW_PER_FULL = gl.constexpr(2)


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The pipeline slot after ``slot`` and the barrier phase that belongs to it."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), phase ^ wrapped.to(gl.int32)


@gluon.jit
def tile_position(tile, row_tiles, column_tiles, BAND: gl.constexpr):
    """Row and column of the ``tile``-th tile: down the rows of a band, then to the next column.

    Tiles that run at the same time then share rows of A and columns of B in L2.
    """
    tiles_per_band = column_tiles * BAND
    band = tile // tiles_per_band
    rows = gl.minimum(row_tiles - band * BAND, BAND)
    inside = tile % tiles_per_band
    return band * BAND + inside % rows, inside // rows


@gluon.jit
def first_narrow(full_tiles, narrow_tiles):
    """This program's first narrow tile; see ``next_narrow``."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    remainder = full_tiles % programs
    idle = gl.where(remainder > 0, programs - remainder, 0)
    head = gl.minimum(NARROW_PER_FULL * idle, narrow_tiles)
    own = program - remainder
    takes_head = (idle > 0) & (own >= 0) & (own < head)
    return gl.where(takes_head, own, head + program), head, idle


@gluon.jit
def next_narrow(narrow, head, idle):
    """The narrow tile after ``narrow``.

    The programs that had no full tile in the last round take ``NARROW_PER_FULL`` narrow tiles each
    (the first ``head`` tiles); what is left goes round all programs.
    """
    beyond = narrow + idle
    in_head = gl.where(beyond < head, beyond, head + gl.program_id(0))
    return gl.where(narrow < head, in_head, narrow + gl.num_programs(0))
