"""The persistent, warp-specialised kernel: out = activation x weight^T (+ bias).

One producer warp copies tiles into a ring of shared-memory slots (TMA); two consumer warpgroups
multiply (wgmma), each its own half of the tile's rows, in one or two waves of 64 rows (``waves``).
A tile of 64 rows has one consumer, and two programs share a multiprocessor.
A tile may have 96 or 192 columns: two neighbouring parts, one twice as wide as the other, so that
the results' shapes are powers of two.
Rows beyond M and columns beyond N and K are read as zeros and not written, by TMA.

Two partitions rather than one of eight warps, so that no barrier spans both consumers and one can
promote while the other has the tensor cores.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box
from blockscale.kernels.gluon.epilogue import write
from blockscale.kernels.gluon.schedule import (
    WEIGHT_BLOCK,
    allocate_barriers,
    allocate_scale_slots,
    first_narrow,
    first_weight_scale,
    hand_over_scale,
    next_narrow,
    next_slot,
    put_scale,
    tile_position,
)
from blockscale.kernels.gluon.split import add_pieces, draw_ticket, piece_offsets
from blockscale.kernels.gluon.waves import WAVE_ROWS, accumulate, wave_layout

# K of a slot: one scale block.
K_BLOCK = gl.constexpr(128)


@gluon.jit
def part_columns(column, WIDE: gl.constexpr, REST: gl.constexpr):
    """Where the wide part and the rest of a tile start, so that neither meets two scale blocks."""
    wide = column
    rest = column + WIDE
    if REST > 0:
        rest_is_first = column % WEIGHT_BLOCK + WIDE > WEIGHT_BLOCK
        wide = gl.where(rest_is_first, column + REST, column)
        rest = gl.where(rest_is_first, column, column + WIDE)
    return wide, rest


@gluon.jit
def _load_weights(ring, operands, slot, columns, k, is_wanted, REST: gl.constexpr):
    """Expect all of a slot's bytes and start the copies of its weights."""
    full = ring[4]
    a, b, b_rest, a_scales, _b_scales, _b_scale_stride = operands
    rest_bytes: gl.constexpr = b_rest.block_type.nbytes if REST > 0 else 0
    slot_bytes: gl.constexpr = (
        a.block_type.nbytes + b.block_type.nbytes + rest_bytes + a_scales.block_type.nbytes
    )
    wide, rest = columns
    mbarrier.expect(full.index(slot), slot_bytes, pred=is_wanted)
    load_box(b, [wide, k], full.index(slot), ring[1].index(slot), pred=is_wanted)
    if REST > 0:
        load_box(b_rest, [rest, k], full.index(slot), ring[6].index(slot), pred=is_wanted)


@gluon.jit
def _weights_ahead(ring, operands, columns, first_block, blocks, REST: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Start copying the first slots' weights, then wait for the kernel ahead; how many slots.

    Weights are no result of that kernel (``product`` says what this asks of who writes them).
    """
    early = gl.minimum(blocks, STAGES)
    for slot in range(early):
        _load_weights(ring, operands, slot, columns, (first_block + slot) * K_BLOCK, True, REST)
    gdc_wait()
    gdc_launch_dependents()
    return early


@gluon.jit
def _fill(ring, operands, row, columns, first_block, blocks, slot, phase, early, REST: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """Copy the slots of one tile; ``slot`` and ``phase`` go on where the last tile stopped.

    ``early``: for so many slots from here on, ``_weights_ahead`` has copied the weights.
    """
    full, empty = ring[4], ring[5]
    a, a_scales, b_scales, b_scale_stride = operands[0], operands[3], operands[4], operands[5]
    wide, rest = columns
    if REST > 0:
        # A part may lie beyond the last column: it has no scale.
        last = operands[1].shape[0] - 1
        wide, rest = gl.minimum(wide, last), gl.minimum(rest, last)
    b_scale = first_weight_scale(b_scales, wide, b_scale_stride, first_block)
    next_scale = gl.load(b_scale)
    # From the scale of the wide part to that of the rest.
    to_rest = (rest // WEIGHT_BLOCK - wide // WEIGHT_BLOCK) * b_scale_stride
    next_rest = next_scale
    if REST > 0:
        next_rest = gl.load(b_scale + to_rest)
    for block in range(first_block, first_block + blocks):
        scale = next_scale
        rest_scale = next_rest
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < first_block + blocks, 1, 0)
        next_scale = gl.load(b_scale)
        next_rest = next_scale
        if REST > 0:
            next_rest = gl.load(b_scale + to_rest)
        mbarrier.wait(empty.index(slot), phase)
        _load_weights(ring, operands, slot, columns, block * K_BLOCK, early <= 0, REST)
        load_box(a, [row, block * K_BLOCK], full.index(slot), ring[0].index(slot))
        load_box(a_scales, [block, row], full.index(slot), ring[2].index(slot))
        if REST > 0:
            put_scale(rest_scale, ring[7], slot)
        hand_over_scale(scale, ring[3], full, slot)
        early -= 1
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase, early


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
def _produce(ring, operands, shape, split, BM: gl.constexpr, BN: gl.constexpr, REST: gl.constexpr,
             STAGES: gl.constexpr, BAND: gl.constexpr, SPLIT: gl.constexpr, NARROW: gl.constexpr,
             OVERLAP: gl.constexpr):  # fmt: skip
    """The producer partition."""
    row_tiles, column_tiles, all_blocks = shape
    whole_tiles, pieces, piece_blocks, items, narrow_tiles = split
    WIDTH: gl.constexpr = BN + REST
    slot = 0
    phase = 1
    early = 0
    if OVERLAP:
        own = gl.program_id(0)
        tile, _piece, first_block, blocks = _item(
            own, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT
        )
        _row, column = tile_position(tile, row_tiles, column_tiles, BAND)
        columns = part_columns(column * WIDTH, BN, REST)
        blocks = gl.where(own < items, blocks, 0)
        early = _weights_ahead(ring, operands, columns, first_block, blocks, REST, STAGES)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, _piece, first_block, blocks = _item(
            item, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT
        )
        row, column = tile_position(tile, row_tiles, column_tiles, BAND)
        columns = part_columns(column * WIDTH, BN, REST)
        slot, phase, early = _fill(ring, operands, row * BM, columns, first_block, blocks, slot,
                                   phase, early, REST, STAGES)  # fmt: skip
    if NARROW:
        narrow, head, idle = first_narrow(items, narrow_tiles)
        while narrow < narrow_tiles:
            columns = part_columns(column_tiles * BN, BN, 0)
            slot, phase, early = _fill(ring, operands, narrow * BM, columns, 0, all_blocks, slot,
                                       phase, early, 0, STAGES)  # fmt: skip
            narrow = next_narrow(narrow, head, idle)


@gluon.jit
def _publish(result0, result1, workspace, tickets, part, piece, pieces, ME: gl.constexpr,
             BM: gl.constexpr, BN: gl.constexpr, CONSUMERS: gl.constexpr, TWO_WAVES: gl.constexpr,
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
            ME: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, CONSUMERS: gl.constexpr,
            BUFFERS: gl.constexpr, TWO_WAVES: gl.constexpr, SPLIT: gl.constexpr,
            LAYOUT: gl.constexpr):  # fmt: skip
    """Write a whole tile, or publish a piece and write the tile if it is the last one."""
    out, staging, bias, has_bias = target
    workspace, tickets = sums
    if SPLIT and not is_whole:
        first, is_last = _publish(result0, result1, workspace, tickets, tile, piece, pieces, ME,
                                  BM, BN, CONSUMERS, TWO_WAVES, LAYOUT)  # fmt: skip
        if is_last:
            total = add_pieces(first, BM * BN, pieces, WAVE_ROWS, BN, LAYOUT)
            buffer = write(total, out, staging, buffer, bias, has_bias, row, column, n, ME, BN,
                            BUFFERS, LAYOUT)  # fmt: skip
            if TWO_WAVES:
                total = add_pieces(first + WAVE_ROWS * BN, BM * BN, pieces, WAVE_ROWS, BN, LAYOUT)
                buffer = write(total, out, staging, buffer, bias, has_bias, row + WAVE_ROWS,
                                column, n, ME, BN, BUFFERS, LAYOUT)  # fmt: skip
    else:
        buffer = write(result0, out, staging, buffer, bias, has_bias, row, column, n, ME, BN,
                        BUFFERS, LAYOUT)  # fmt: skip
        if TWO_WAVES:
            buffer = write(result1, out, staging, buffer, bias, has_bias, row + WAVE_ROWS,
                            column, n, ME, BN, BUFFERS, LAYOUT)  # fmt: skip
    return buffer


@gluon.jit
def _consume(ring, target, sums, n, shape, split, ME: gl.constexpr, BM: gl.constexpr,
             BN: gl.constexpr, REST: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
             BUFFERS: gl.constexpr, BAND: gl.constexpr, TWO_WAVES: gl.constexpr,
             SPLIT: gl.constexpr, NARROW: gl.constexpr):  # fmt: skip
    """A consumer partition: number ``ME`` of ``CONSUMERS``."""
    LAYOUT: gl.constexpr = wave_layout(BN)
    OWN: gl.constexpr = ME * (BM // CONSUMERS)
    row_tiles, column_tiles, all_blocks = shape
    whole_tiles, pieces, piece_blocks, items, narrow_tiles = split
    slot = 0
    phase = 0
    buffer = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, piece, _first_block, blocks = _item(
            item, whole_tiles, pieces, piece_blocks, all_blocks, SPLIT
        )
        tile_row, tile_column = tile_position(tile, row_tiles, column_tiles, BAND)
        result0, result1, slot, phase = accumulate(
            ring, blocks, slot, phase, OWN, BN, REST, STAGES, TWO_WAVES, LAYOUT
        )
        row = tile_row * BM + OWN
        if REST > 0:
            out, staging, bias, has_bias = target
            wide, rest = part_columns(tile_column * (BN + REST), BN, REST)
            buffer = write(result0, out, staging, buffer, bias, has_bias, row, wide, n, ME, BN,
                           BUFFERS, LAYOUT)  # fmt: skip
            buffer = write(result1, out, staging, buffer, bias, has_bias, row, rest, n, ME, REST,
                           BUFFERS, wave_layout(REST))  # fmt: skip
        else:
            buffer = _finish(result0, result1, item < whole_tiles, target, sums, row,
                             tile_column * BN, tile - whole_tiles, piece, pieces, buffer, n, ME, BM,
                             BN, CONSUMERS, BUFFERS, TWO_WAVES, SPLIT, LAYOUT)  # fmt: skip
    if NARROW:
        HALF: gl.constexpr = BN // 2
        NARROW_LAYOUT: gl.constexpr = wave_layout(BN // 2)
        narrow, head, idle = first_narrow(items, narrow_tiles)
        while narrow < narrow_tiles:
            result0, result1, slot, phase = accumulate(
                ring, all_blocks, slot, phase, OWN, HALF, 0, STAGES, TWO_WAVES, NARROW_LAYOUT
            )
            buffer = _finish(result0, result1, True, target, sums, narrow * BM + OWN,
                             column_tiles * BN, 0, 0, 1, buffer, n, ME, BM, HALF, CONSUMERS,
                             BUFFERS, TWO_WAVES, False, NARROW_LAYOUT)  # fmt: skip
            narrow = next_narrow(narrow, head, idle)
    tma.store_wait(0)


@gluon.jit
def dense_kernel(a, b, b_rest, a_scale_boxes, out, b_scales, bias, workspace, tickets, n,
                 b_scale_stride, has_bias, row_tiles, column_tiles, all_blocks, whole_tiles,
                 pieces, piece_blocks, items, narrow_tiles, REST: gl.constexpr,
                 STAGES: gl.constexpr, BUFFERS: gl.constexpr, BAND: gl.constexpr,
                 SPLIT: gl.constexpr, NARROW: gl.constexpr, OVERLAP: gl.constexpr,
                 CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """One program a multiprocessor takes items ``program_id, program_id + programs, ...``.

    Items below ``whole_tiles`` are whole tiles; the rest up to ``items`` are pieces, ``pieces`` to
    a tile; then come ``narrow_tiles`` of half width in the column after the last (``work``).
    """
    BM: gl.constexpr = a.block_type.shape[0]
    BN: gl.constexpr = b.block_type.shape[0]
    CONSUMERS: gl.constexpr = 2 if BM > WAVE_ROWS else 1
    TWO_WAVES: gl.constexpr = BM > CONSUMERS * WAVE_ROWS
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BM, K_BLOCK], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, BN, K_BLOCK], b.layout)
    a_scale_slots = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], a_scale_boxes.layout)
    b_scale_slots = allocate_scale_slots(STAGES)
    # Tiles of one part have no rest: its slots are the other part's, and not used.
    rest_slots = b_slots
    rest_scale_slots = b_scale_slots
    if REST > 0:
        rest_slots = gl.allocate_shared_memory(b.dtype, [STAGES, REST, K_BLOCK], b_rest.layout)
        rest_scale_slots = allocate_scale_slots(STAGES)
    staging = gl.allocate_shared_memory(
        out.dtype, [CONSUMERS * BUFFERS, WAVE_ROWS, out.block_type.shape[1]], out.layout
    )
    full, empty = allocate_barriers(STAGES, CONSUMERS)

    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty, rest_slots,
            rest_scale_slots)  # fmt: skip
    operands = (a, b, b_rest, a_scale_boxes, b_scales, b_scale_stride)
    target = (out, staging, bias, has_bias)
    sums = (workspace, tickets)
    shape = (row_tiles, column_tiles, all_blocks)
    split = (whole_tiles, pieces, piece_blocks, items, narrow_tiles)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, target, sums, n, shape, split, 0, BM, BN, REST, CONSUMERS, STAGES,
                            BUFFERS, BAND, TWO_WAVES, SPLIT, NARROW)),
                (_produce, (ring, operands, shape, split, BM, BN, REST, STAGES, BAND, SPLIT, NARROW,
                            OVERLAP)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, target, sums, n, shape, split, 0, BM, BN, REST, CONSUMERS, STAGES,
                            BUFFERS, BAND, TWO_WAVES, SPLIT, NARROW)),
                (_consume, (ring, target, sums, n, shape, split, 1, BM, BN, REST, CONSUMERS, STAGES,
                            BUFFERS, BAND, TWO_WAVES, SPLIT, NARROW)),
                (_produce, (ring, operands, shape, split, BM, BN, REST, STAGES, BAND, SPLIT, NARROW,
                            OVERLAP)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
