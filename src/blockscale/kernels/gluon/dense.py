"""The persistent, warp-specialised kernel: out = activation x weight^T (+ bias).

One producer warp copies tiles into a ring of shared-memory slots (TMA); two consumer warpgroups
multiply (wgmma), each its own half of the tile's rows, in ``WAVES`` waves of 64 rows. A wave is the
float32 sum of 128 products per element, straight from the tensor core; it is then scaled and added
to the result ("promoted") with one FFMA per element:

    result += wave * (activation_scale[row, k / 128] * weight_scale[column / 128, k / 128])

All zero padding is TMA's: rows beyond M, columns beyond N and K are read as zeros and not written.

Two partitions rather than one of eight warps, so that no barrier spans both consumers and one can
promote while the other has the tensor cores (facts/kernels.md 2.5). ``TURNS`` can enforce that.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box, partition_barrier, store_box
from blockscale.kernels.gluon.schedule import (
    first_narrow,
    next_narrow,
    next_slot,
    tile_position,
)
from blockscale.kernels.gluon.split import add_pieces, draw_ticket, piece_offsets

# K of a slot: one scale block.
K_BLOCK = gl.constexpr(128)
# Rows of one wgmma.
WAVE_ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# Weight rows that share a scale.
WEIGHT_BLOCK = gl.constexpr(128)

# Values of TURNS. FREE: the consumers meet only at the ring. STAGGERED: the second starts one wave
# after the first. ALTERNATING: before each wave a consumer waits for the other to have issued its.
FREE = gl.constexpr(0)
STAGGERED = gl.constexpr(1)
ALTERNATING = gl.constexpr(2)


@gluon.jit
def _fill(ring, operands, row, column, first_block, blocks, slot, phase,
          STAGES: gl.constexpr, SCALES_BY_TMA: gl.constexpr):  # fmt: skip
    """Copy the slots of one tile; ``slot`` and ``phase`` go on where the last tile stopped."""
    a_slots, b_slots, scale_slots, full, empty = ring
    a, b, a_scales = operands
    slot_bytes: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
    scale_bytes: gl.constexpr = a_scales.block_type.nbytes if SCALES_BY_TMA else 0
    for block in range(first_block, first_block + blocks):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), slot_bytes + scale_bytes)
        load_box(b, [column, block * K_BLOCK], full.index(slot), b_slots.index(slot))
        load_box(a, [row, block * K_BLOCK], full.index(slot), a_slots.index(slot))
        if SCALES_BY_TMA:
            load_box(a_scales, [block, row], full.index(slot), scale_slots.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _item(item, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT: gl.constexpr):
    """Work item -> tile, piece, first K block and number of K blocks."""
    tile = item
    piece = 0
    first_block = 0
    blocks = all_blocks
    if SPLIT:
        part = item - whole_tiles
        is_piece = part >= 0
        tile = gl.where(is_piece, whole_tiles + part // pieces, item)
        piece = gl.where(is_piece, part % pieces, 0)
        first_block = piece * piece_blocks
        blocks = gl.where(is_piece, gl.minimum(all_blocks - first_block, piece_blocks), all_blocks)
    return tile, piece, first_block, blocks


@gluon.jit
def _produce(ring, operands, shape, split, BM: gl.constexpr, BN: gl.constexpr,
             STAGES: gl.constexpr, BAND: gl.constexpr, SPLIT: gl.constexpr, NARROW: gl.constexpr,
             SCALES_BY_TMA: gl.constexpr):  # fmt: skip
    """The producer partition."""
    row_tiles, column_tiles, all_blocks = shape
    whole_tiles, pieces, piece_blocks, items, narrow_tiles = split
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, _piece, first_block, blocks = _item(
            item, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT
        )
        row, column = tile_position(tile, row_tiles, column_tiles, BAND)
        slot, phase = _fill(ring, operands, row * BM, column * BN, first_block, blocks, slot,
                            phase, STAGES, SCALES_BY_TMA)  # fmt: skip
    if NARROW:
        narrow, head, idle = first_narrow(items, narrow_tiles)
        while narrow < narrow_tiles:
            slot, phase = _fill(ring, operands, narrow * BM, column_tiles * BN, 0, all_blocks,
                                slot, phase, STAGES, SCALES_BY_TMA)  # fmt: skip
            narrow = next_narrow(narrow, head, idle)


@gluon.jit
def _wave(a, b, partial, turn, turn_phase, ME: gl.constexpr, TURNS: gl.constexpr):
    """64 rows x 128 of K times the weight tile: the unscaled sums."""
    if TURNS == ALTERNATING:
        mbarrier.wait(turn.index(ME), turn_phase)
    partial = warpgroup_mma(a, b, partial, use_acc=False, is_async=True)
    if TURNS == ALTERNATING:
        mbarrier.arrive(turn.index(1 - ME), count=1)
    return warpgroup_mma_wait(0, deps=(partial,))


@gluon.jit
def _promote(result, partial, scales):
    """``result += partial * scales`` by row, finished before the next wave is issued."""
    result += partial * gl.expand_dims(scales, 1)
    # Without this (free) wait LLVM moves the FFMAs below the next wgmma and the loop spills
    # 436-520 bytes (ptxas 13.0, facts/kernels.md 2.5).
    return warpgroup_mma_wait(0, deps=(result,))


@gluon.jit
def _accumulate(ring, turn, turn_phase, scales, limits, row, column, first_block, blocks, slot,
                phase, ME: gl.constexpr, BM: gl.constexpr, COLUMNS: gl.constexpr,
                STAGES: gl.constexpr, WAVES: gl.constexpr, TURNS: gl.constexpr,
                SCALES_BY_TMA: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """This consumer's rows of one tile: one or two (64, COLUMNS) float32 results."""
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    FIRST: gl.constexpr = ME * (BM // CONSUMERS)
    SECOND: gl.constexpr = FIRST + WAVE_ROWS
    a_slots, b_slots, scale_slots, full, empty = ring
    a_scales, a_scale_stride, b_scales, b_scale_stride, lane_stride = scales
    m, _n = limits

    lanes = gl.arange(0, WAVE_ROWS, layout=ROWS)
    result0 = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    result1 = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    partial = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    # lane_stride is 0: all lanes read the same weight scale, but ptxas does not know it. A value
    # that it knows to be uniform goes to a uniform register (R2UR) right between the wgmmas, where
    # the warp then waits for the load (seen in SASS of 12.8 and 13.0).
    b_pointers = (
        b_scales + (column // WEIGHT_BLOCK) * b_scale_stride + first_block + lanes * lane_stride
    )
    a_pointers = a_scales + first_block.to(gl.int64) * a_scale_stride + row + FIRST + lanes
    inside0 = row + FIRST + lanes < m
    inside1 = row + SECOND + lanes < m
    next_b = gl.load(b_pointers)
    next_a0 = next_b
    next_a1 = next_b
    if not SCALES_BY_TMA:
        next_a0 = gl.load(a_pointers, mask=inside0, other=0.0)
        if WAVES == 2:
            next_a1 = gl.load(a_pointers + WAVE_ROWS, mask=inside1, other=0.0)

    for block in range(blocks):
        scale0 = next_a0 * next_b
        scale1 = next_a1 * next_b
        scale_b = next_b
        # The last round loads its own scales again, rather than beyond the end.
        step = gl.where(block + 1 < blocks, 1, 0)
        b_pointers += step
        next_b = gl.load(b_pointers)
        if not SCALES_BY_TMA:
            a_pointers += step * a_scale_stride
            next_a0 = gl.load(a_pointers, mask=inside0, other=0.0)
            if WAVES == 2:
                next_a1 = gl.load(a_pointers + WAVE_ROWS, mask=inside1, other=0.0)
        mbarrier.wait(full.index(slot), phase)
        if SCALES_BY_TMA:
            slot_scales = scale_slots.index(slot).reshape((BM,))
            scale0 = slot_scales.slice(FIRST, WAVE_ROWS, dim=0).load(ROWS) * scale_b
            if WAVES == 2:
                scale1 = slot_scales.slice(SECOND, WAVE_ROWS, dim=0).load(ROWS) * scale_b
        a = a_slots.index(slot)
        b = b_slots.index(slot).slice(0, COLUMNS, dim=0).permute((1, 0))
        partial = _wave(a.slice(FIRST, WAVE_ROWS, dim=0), b, partial, turn, turn_phase, ME, TURNS)
        if WAVES == 1:
            mbarrier.arrive(empty.index(slot), count=1)
        result0 = _promote(result0, partial, scale0)
        turn_phase ^= 1
        if WAVES == 2:
            partial = _wave(
                a.slice(SECOND, WAVE_ROWS, dim=0), b, partial, turn, turn_phase, ME, TURNS
            )
            mbarrier.arrive(empty.index(slot), count=1)
            result1 = _promote(result1, partial, scale1)
            turn_phase ^= 1
        slot, phase = next_slot(slot, phase, STAGES)
    return result0, result1, slot, phase, turn_phase


@gluon.jit
def _write(result, out, staging, bias, has_bias, row, column, n, buffer,
           COLUMNS: gl.constexpr, BUFFERS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Add the bias, round to the output's dtype and start the store of one wave's rows."""
    if has_bias != 0:
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        added = gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)
        result += gl.expand_dims(added, 0)
    target = staging.index(buffer)
    # Stores are issued in the order of the buffers, so this one's last store has been read.
    tma.store_wait(BUFFERS - 1)
    target.slice(0, COLUMNS, dim=1).store(result.to(out.dtype))
    fence_async_shared()
    store_box(out, [row, column], target)
    return (buffer + 1) % BUFFERS


@gluon.jit
def _consume(ring, turn, staging, out, scales, limits, bias, workspace, shape, split,
             ME: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             BUFFERS: gl.constexpr, BAND: gl.constexpr, WAVES: gl.constexpr, SPLIT: gl.constexpr,
             NARROW: gl.constexpr, TURNS: gl.constexpr, SCALES_BY_TMA: gl.constexpr):  # fmt: skip
    """A consumer partition."""
    pass
