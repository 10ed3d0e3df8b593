"""The persistent, warp-specialised kernel: out = activation x weight^T (+ bias).

One producer warp copies tiles into a ring of shared-memory slots (TMA); two consumer warpgroups
multiply (wgmma), each its own half of the tile's rows, in one or two waves of 64 rows (``waves``).
Rows beyond M and columns beyond N and K are read as zeros and not written, by TMA.

Two partitions rather than one of eight warps, so that no barrier spans both consumers and one can
promote while the other has the tensor cores (facts/kernels.md 2.5). ``ALTERNATE`` makes them take
turns at issuing waves.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box, store_box
from blockscale.kernels.gluon.schedule import (
    allocate_barriers,
    allocate_scale_slots,
    first_narrow,
    first_weight_scale,
    hand_over_scale,
    next_narrow,
    next_slot,
    tile_position,
)
from blockscale.kernels.gluon.split import add_pieces, draw_ticket, piece_offsets
from blockscale.kernels.gluon.waves import CONSUMERS, WAVE_ROWS, accumulate

# K of a slot: one scale block.
K_BLOCK = gl.constexpr(128)


@gluon.jit
def _fill(ring, operands, row, column, first_block, blocks, slot, phase,
          STAGES: gl.constexpr, SCALES_BY_TMA: gl.constexpr):  # fmt: skip
    """Copy the slots of one tile; ``slot`` and ``phase`` go on where the last tile stopped."""
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = ring
    a, b, a_scales, b_scales, b_scale_stride = operands
    slot_bytes: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
    scale_bytes: gl.constexpr = a_scales.block_type.nbytes if SCALES_BY_TMA else 0
    b_scale = first_weight_scale(b_scales, column, b_scale_stride, first_block)
    next_scale = gl.load(b_scale)
    for block in range(first_block, first_block + blocks):
        scale = next_scale
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < first_block + blocks, 1, 0)
        next_scale = gl.load(b_scale)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), slot_bytes + scale_bytes)
        load_box(b, [column, block * K_BLOCK], full.index(slot), b_slots.index(slot))
        load_box(a, [row, block * K_BLOCK], full.index(slot), a_slots.index(slot))
        if SCALES_BY_TMA:
            load_box(a_scales, [block, row], full.index(slot), a_scale_slots.index(slot))
        hand_over_scale(scale, b_scale_slots, full, slot)
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
def _write(result, out, staging, buffer, bias, has_bias, row, column, n, ME: gl.constexpr,
           COLUMNS: gl.constexpr, BUFFERS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Add the bias, round to the output's dtype and start the store of one wave's rows."""
    if has_bias != 0:
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        added = gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)
        result += gl.expand_dims(added, 0)
    target = staging.index(ME * BUFFERS + buffer)
    # Stores are issued in the order of the buffers: this buffer's last one has been read.
    tma.store_wait(BUFFERS - 1)
    target.slice(0, COLUMNS, dim=1).store(result.to(out.dtype))
    fence_async_shared()
    store_box(out, [row, column], target)
    return (buffer + 1) % BUFFERS


@gluon.jit
def _publish(result0, result1, workspace, tickets, part, piece, pieces, ME: gl.constexpr,
             BM: gl.constexpr, BN: gl.constexpr, TWO_WAVES: gl.constexpr,
             LAYOUT: gl.constexpr):  # fmt: skip
    """Write this piece's sums; tell where the first piece's lie and whether all have come."""
    first = workspace + part * pieces * (BM * BN) + ME * (BM // CONSUMERS) * BN
    own = first + piece * (BM * BN) + piece_offsets(WAVE_ROWS, BN, LAYOUT)
    gl.store(own, result0)
    if TWO_WAVES:
        gl.store(own + WAVE_ROWS * BN, result1)
    ticket = tickets + part * CONSUMERS + ME
    is_last = draw_ticket(ticket) == pieces - 1
    if is_last:
        gl.store(ticket, 0)
    return first, is_last


@gluon.jit
def _finish(result0, result1, is_whole, target, sums, row, column, tile, piece, pieces, buffer, n,
            ME: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BUFFERS: gl.constexpr,
            TWO_WAVES: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Write a whole tile, or publish a piece and write the tile if it is the last one."""
    out, staging, bias, has_bias = target
    workspace, tickets = sums
    if SPLIT and not is_whole:
        first, is_last = _publish(result0, result1, workspace, tickets, tile, piece, pieces, ME,
                                  BM, BN, TWO_WAVES, LAYOUT)  # fmt: skip
        if is_last:
            total = add_pieces(first, BM * BN, pieces, WAVE_ROWS, BN, LAYOUT)
            buffer = _write(total, out, staging, buffer, bias, has_bias, row, column, n, ME, BN,
                            BUFFERS, LAYOUT)  # fmt: skip
            if TWO_WAVES:
                total = add_pieces(first + WAVE_ROWS * BN, BM * BN, pieces, WAVE_ROWS, BN, LAYOUT)
                buffer = _write(total, out, staging, buffer, bias, has_bias, row + WAVE_ROWS,
                                column, n, ME, BN, BUFFERS, LAYOUT)  # fmt: skip
    else:
        buffer = _write(result0, out, staging, buffer, bias, has_bias, row, column, n, ME, BN,
                        BUFFERS, LAYOUT)  # fmt: skip
        if TWO_WAVES:
            buffer = _write(result1, out, staging, buffer, bias, has_bias, row + WAVE_ROWS,
                            column, n, ME, BN, BUFFERS, LAYOUT)  # fmt: skip
    return buffer


@gluon.jit
def _consume(ring, turns, a_scales, a_scale_stride, target, sums, limits, shape, split,
             ME: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             BUFFERS: gl.constexpr, BAND: gl.constexpr, TWO_WAVES: gl.constexpr,
             SPLIT: gl.constexpr, NARROW: gl.constexpr, ALTERNATE: gl.constexpr,
             SCALES_BY_TMA: gl.constexpr):  # fmt: skip
    """A consumer partition: number ``ME`` of two."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32]
    )
    OWN: gl.constexpr = ME * (BM // CONSUMERS)
    m, n = limits
    row_tiles, column_tiles, all_blocks = shape
    whole_tiles, pieces, piece_blocks, items, narrow_tiles = split
    slot = 0
    phase = 0
    turn_phase = 1 - ME
    buffer = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, piece, first_block, blocks = _item(
            item, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT
        )
        tile_row, tile_column = tile_position(tile, row_tiles, column_tiles, BAND)
        result0, result1, turn_phase, slot, phase = accumulate(
            ring, turns, turn_phase, a_scales, a_scale_stride, m, tile_row * BM, first_block,
            blocks, slot, phase, ME, BM, BN, STAGES, TWO_WAVES, ALTERNATE, SCALES_BY_TMA,
            LAYOUT)  # fmt: skip
        buffer = _finish(result0, result1, item < whole_tiles, target, sums, tile_row * BM + OWN,
                         tile_column * BN, tile - whole_tiles, piece, pieces, buffer, n, ME, BM,
                         BN, BUFFERS, TWO_WAVES, SPLIT, LAYOUT)  # fmt: skip
    if NARROW:
        HALF: gl.constexpr = BN // 2
        NARROW_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN // 2, 32]
        )
        narrow, head, idle = first_narrow(items, narrow_tiles)
        while narrow < narrow_tiles:
            result0, result1, turn_phase, slot, phase = accumulate(
                ring, turns, turn_phase, a_scales, a_scale_stride, m, narrow * BM, 0, all_blocks,
                slot, phase, ME, BM, HALF, STAGES, TWO_WAVES, ALTERNATE, SCALES_BY_TMA,
                NARROW_LAYOUT)  # fmt: skip
            buffer = _finish(result0, result1, True, target, sums, narrow * BM + OWN,
                             column_tiles * BN, 0, 0, 1, buffer, n, ME, BM, HALF, BUFFERS,
                             TWO_WAVES, False, NARROW_LAYOUT)  # fmt: skip
            narrow = next_narrow(narrow, head, idle)
    tma.store_wait(0)


@gluon.jit
def dense_kernel(a, b, a_scale_boxes, out, a_scales, b_scales, bias, workspace, tickets, m, n,
                 a_scale_stride, b_scale_stride, has_bias, row_tiles, column_tiles, all_blocks,
                 whole_tiles, pieces, piece_blocks, items, narrow_tiles, STAGES: gl.constexpr,
                 BUFFERS: gl.constexpr, BAND: gl.constexpr, SPLIT: gl.constexpr,
                 NARROW: gl.constexpr, ALTERNATE: gl.constexpr, SCALES_BY_TMA: gl.constexpr,
                 OVERLAP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
                 PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """One program a multiprocessor takes items ``program_id, program_id + programs, ...``.

    Items below ``whole_tiles`` are whole tiles; the rest up to ``items`` are pieces, ``pieces`` to
    a tile; then come ``narrow_tiles`` of half width in the column after the last (``work``).
    """
    BM: gl.constexpr = a.block_type.shape[0]
    BN: gl.constexpr = b.block_type.shape[0]
    TWO_WAVES: gl.constexpr = BM > CONSUMERS * WAVE_ROWS
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BM, K_BLOCK], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, BN, K_BLOCK], b.layout)
    SCALE_SLOTS: gl.constexpr = STAGES if SCALES_BY_TMA else 1
    SCALE_ROWS: gl.constexpr = BM if SCALES_BY_TMA else 4
    a_scale_slots = gl.allocate_shared_memory(
        gl.float32, [SCALE_SLOTS, 1, SCALE_ROWS], a_scale_boxes.layout
    )
    b_scale_slots = allocate_scale_slots(STAGES)
    staging = gl.allocate_shared_memory(out.dtype, [CONSUMERS * BUFFERS, WAVE_ROWS, BN], out.layout)
    full, empty = allocate_barriers(STAGES, CONSUMERS)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)

    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty)
    operands = (a, b, a_scale_boxes, b_scales, b_scale_stride)
    target = (out, staging, bias, has_bias)
    sums = (workspace, tickets)
    shape = (row_tiles, column_tiles, all_blocks)
    split = (whole_tiles, pieces, piece_blocks, items, narrow_tiles)
    gl.warp_specialize(
        [
            (_consume, (ring, turns, a_scales, a_scale_stride, target, sums, (m, n), shape, split,
                        0, BM, BN, STAGES, BUFFERS, BAND, TWO_WAVES, SPLIT, NARROW, ALTERNATE,
                        SCALES_BY_TMA)),
            (_consume, (ring, turns, a_scales, a_scale_stride, target, sums, (m, n), shape, split,
                        1, BM, BN, STAGES, BUFFERS, BAND, TWO_WAVES, SPLIT, NARROW, ALTERNATE,
                        SCALES_BY_TMA)),
            (_produce, (ring, operands, shape, split, BM, BN, STAGES, BAND, SPLIT, NARROW,
                        SCALES_BY_TMA)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
