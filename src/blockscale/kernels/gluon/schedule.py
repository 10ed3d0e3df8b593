"""Device code: the order of tiles and of pipeline slots. Every partition walks both alike."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockscale.kernels.gluon.dialect import in_each_program, own_barrier_layout

# A narrow tile has half the columns of a full one and takes half its time.
NARROW_PER_FULL = gl.constexpr(2)
# Weight rows that share a scale.
WEIGHT_BLOCK = gl.constexpr(128)


@gluon.constexpr_function
def _one_warp_layout(programs):
    return gl.BlockedLayout([1], [32], [1], [0], cga_layout=in_each_program(1, programs))


@gluon.constexpr_function
def _plain_layout(programs):
    return gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=in_each_program(1, programs))


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The pipeline slot after ``slot`` and the barrier phase that belongs to it."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def slot_before(slot, STAGES: gl.constexpr):
    """The pipeline slot before ``slot``.

    Not a variable that a loop hands on: Triton 3.6 takes ``before = slot`` at the end of a loop for
    unchanged if it started as ``slot`` did; the kernel then waited for ever (H100, 2026-11-25).
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)


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


@gluon.jit
def first_weight_scale(b_scales, row, b_scale_stride, block):
    """Where the scale of weight row ``row`` and K block ``block`` lies."""
    return b_scales + (row // WEIGHT_BLOCK) * b_scale_stride + block


@gluon.jit
def hand_over_scale(value, scale_slots, full, slot):
    """Producer warp: put a weight scale into a slot and arrive at its barrier.

    The consumers could load it themselves, but ptxas takes a value that is the same in all lanes to
    a uniform register (R2UR), or copies it for the next round, right between two wgmmas; the warp
    then waits there for the load (seen in SASS of ptxas 12.8 and 13.0). A producer may wait.
    """
    put_scale(value, scale_slots, slot)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def put_scale(value, scale_slots, slot):
    """Producer warp: put a weight scale into a slot that is handed over later."""
    ONE_WARP: gl.constexpr = _one_warp_layout(gl.num_ctas())
    scale_slots.index(slot).store(gl.full((1,), value, gl.float32, ONE_WARP))


@gluon.jit
def take_scale(scale_slots, slot, LAYOUT: gl.constexpr):
    """Consumer: a slot's weight scale, in every thread.

    racecheck's reports of this load and of ``put_scale``'s store are told apart by their lines
    (``tools/racecheck.py``): no other scale may be put or taken there.
    """
    return scale_slots.index(slot).load(LAYOUT)


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """The barriers of a ring.

    A slot is full after its copies and ``hand_over_scale``, empty after every consumer's arrival.
    """
    OWN: gl.constexpr = own_barrier_layout(gl.num_ctas())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, gl.num_ctas()], OWN)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, gl.num_ctas()], OWN)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=2)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return full, empty


@gluon.jit
def release(ring, slot, is_used, PAIR: gl.constexpr):
    """A consumer has read a slot, if ``is_used``: its producer may fill it, and so may the pair's.

    The pair's barrier is ``ring[8]``.
    """
    mbarrier.arrive(ring[5].index(slot), count=1, pred=is_used)
    if PAIR:
        mbarrier.arrive(ring[8].index(slot), count=1, pred=is_used)


@gluon.jit
def allocate_scale_slots(STAGES: gl.constexpr):
    """One weight scale a slot."""
    PLAIN: gl.constexpr = _plain_layout(gl.num_ctas())
    return gl.allocate_shared_memory(gl.float32, [STAGES, 1], PLAIN)
