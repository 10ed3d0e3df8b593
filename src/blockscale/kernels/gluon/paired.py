"""The dense kernel for pairs of programs: what both read, one copy brings to both (multicast).

Two programs on neighbouring multiprocessors (a cluster) compute two neighbouring tiles. Each has
the ring, the producer and the consumers of ``dense``; of the operand that the tiles share, the
first program's producer copies each K block into the slots of both. L2 then gives 32 KB instead of
48 KB to a 256x128 tile for each K block.

- A slot's full barrier is its program's own: each producer expects all bytes of its slot there,
  the multicast copy counts them there too, and the producer hands over its own weight scale.
- A slot has two empty barriers. The own one holds back what the program copies for itself. The
  pair's lies in the first program; the consumers of both arrive there, and the first producer waits
  for it, so that no slot is filled before both programs have read it.
- The first program ends after the last arrival from the second (``_wait_for_both``): shared memory
  of a program that has ended must not be reached for. The second has waited for all its copies.

For Triton both programs hold the same values, and a scalar is a scalar; that each has its own tile
follows from ``number_in_pair`` alone. Needs Triton 3.8 (``dialect.HAS_PAIRS``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dense import K_BLOCK, part_columns
from blockscale.kernels.gluon.dialect import load_box, number_in_pair, pair_barrier_layout
from blockscale.kernels.gluon.epilogue import write
from blockscale.kernels.gluon.schedule import (
    WEIGHT_BLOCK,
    allocate_barriers,
    allocate_scale_slots,
    first_weight_scale,
    hand_over_scale,
    next_slot,
    put_scale,
    tile_position,
)
from blockscale.kernels.gluon.waves import WAVE_ROWS, accumulate, wave_layout

CONSUMERS = gl.constexpr(2)


@gluon.jit
def _own_tile(item, row_tiles, column_tiles, BAND: gl.constexpr, SHARES_WEIGHTS: gl.constexpr):
    """Row and column of this program's tile of a pair."""
    row, column = tile_position(item, row_tiles, column_tiles, BAND)
    if SHARES_WEIGHTS:
        row = 2 * row + number_in_pair()
    else:
        column = 2 * column + number_in_pair()
    return row, column


@gluon.jit
def _load_weights(ring, operands, slot, columns, k, is_wanted, REST: gl.constexpr,
                  SHARES_WEIGHTS: gl.constexpr):  # fmt: skip
    """Expect all of a slot's bytes and start the copies of its weights."""
    full = ring[4]
    a, b, b_rest, a_scales, _b_scales, _b_scale_stride = operands
    rest_bytes: gl.constexpr = b_rest.block_type.nbytes if REST > 0 else 0
    slot_bytes: gl.constexpr = (
        a.block_type.nbytes + b.block_type.nbytes + rest_bytes + a_scales.block_type.nbytes
    )
    wide, rest = columns
    mbarrier.expect(full.index(slot), slot_bytes, pred=is_wanted)
    load_box(b, [wide, k], full.index(slot), ring[1].index(slot), pred=is_wanted,
             multicast=SHARES_WEIGHTS)  # fmt: skip
    if REST > 0:
        load_box(b_rest, [rest, k], full.index(slot), ring[6].index(slot), pred=is_wanted,
                 multicast=SHARES_WEIGHTS)  # fmt: skip


@gluon.jit
def _weights_ahead(ring, operands, columns, blocks, REST: gl.constexpr, STAGES: gl.constexpr,
                   SHARES_WEIGHTS: gl.constexpr):  # fmt: skip
    """As in ``dense``: the first slots' weights, then wait for the kernel ahead; how many slots."""
    early = gl.minimum(blocks, STAGES)
    for slot in range(early):
        _load_weights(ring, operands, slot, columns, slot * K_BLOCK, True, REST, SHARES_WEIGHTS)
    gdc_wait()
    gdc_launch_dependents()
    return early


@gluon.jit
def _fill(ring, operands, row, columns, blocks, slot, phase, early, REST: gl.constexpr,
          STAGES: gl.constexpr, SHARES_WEIGHTS: gl.constexpr):  # fmt: skip
    """Copy the slots of one tile; ``slot`` and ``phase`` go on where the last tile stopped."""
    full, empty, empty_in_both = ring[4], ring[5], ring[8]
    a, a_scales, b_scales, b_scale_stride = operands[0], operands[3], operands[4], operands[5]
    # A tile or a part of it may lie beyond the last column: it has no scale.
    last = operands[1].shape[0] - 1
    wide, rest = gl.minimum(columns[0], last), gl.minimum(columns[1], last)
    b_scale = first_weight_scale(b_scales, wide, b_scale_stride, 0)
    next_scale = gl.load(b_scale)
    to_rest = (rest // WEIGHT_BLOCK - wide // WEIGHT_BLOCK) * b_scale_stride
    next_rest = next_scale
    if REST > 0:
        next_rest = gl.load(b_scale + to_rest)
    for block in range(blocks):
        scale = next_scale
        rest_scale = next_rest
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < blocks, 1, 0)
        next_scale = gl.load(b_scale)
        next_rest = next_scale
        if REST > 0:
            next_rest = gl.load(b_scale + to_rest)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.wait(empty_in_both.index(slot), phase)
        _load_weights(ring, operands, slot, columns, block * K_BLOCK, early <= 0, REST,
                      SHARES_WEIGHTS)  # fmt: skip
        load_box(a, [row, block * K_BLOCK], full.index(slot), ring[0].index(slot),
                 multicast=not SHARES_WEIGHTS)  # fmt: skip
        load_box(a_scales, [block, row], full.index(slot), ring[2].index(slot),
                 multicast=not SHARES_WEIGHTS)  # fmt: skip
        if REST > 0:
            put_scale(rest_scale, ring[7], slot)
        hand_over_scale(scale, ring[3], full, slot)
        early -= 1
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase, early


@gluon.jit
def _wait_for_both(ring, slot, phase, STAGES: gl.constexpr):
    """Until both programs have read all slots."""
    for _ in range(STAGES):
        mbarrier.wait(ring[8].index(slot), phase)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _produce(ring, operands, shape, BM: gl.constexpr, BN: gl.constexpr, REST: gl.constexpr,
             STAGES: gl.constexpr, BAND: gl.constexpr, SHARES_WEIGHTS: gl.constexpr,
             OVERLAP: gl.constexpr):  # fmt: skip
    """The producer partition."""
    row_tiles, column_tiles, blocks, items = shape
    WIDTH: gl.constexpr = BN + REST
    slot = 0
    phase = 1
    early = 0
    if OVERLAP:
        # A launch has no more pairs than items.
        _row, column = _own_tile(gl.program_id(0), row_tiles, column_tiles, BAND, SHARES_WEIGHTS)
        columns = part_columns(column * WIDTH, BN, REST)
        early = _weights_ahead(ring, operands, columns, blocks, REST, STAGES, SHARES_WEIGHTS)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, column = _own_tile(item, row_tiles, column_tiles, BAND, SHARES_WEIGHTS)
        columns = part_columns(column * WIDTH, BN, REST)
        slot, phase, early = _fill(ring, operands, row * BM, columns, blocks, slot, phase, early,
                                   REST, STAGES, SHARES_WEIGHTS)  # fmt: skip
    _wait_for_both(ring, slot, phase, STAGES)


@gluon.jit
def _consume(ring, target, n, shape, ME: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             REST: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, BAND: gl.constexpr,
             TWO_WAVES: gl.constexpr, SHARES_WEIGHTS: gl.constexpr):  # fmt: skip
    """A consumer partition: number ``ME`` of two."""
    LAYOUT: gl.constexpr = wave_layout(BN, gl.num_ctas())
    OWN: gl.constexpr = ME * (BM // CONSUMERS)
    out, staging, bias, has_bias = target
    row_tiles, column_tiles, blocks, items = shape
    slot = 0
    phase = 0
    buffer = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile_row, tile_column = _own_tile(item, row_tiles, column_tiles, BAND, SHARES_WEIGHTS)
        result0, result1, slot, phase = accumulate(
            ring, blocks, slot, phase, OWN, BN, REST, STAGES, TWO_WAVES, LAYOUT, PAIR=True
        )
        row = tile_row * BM + OWN
        wide, rest = part_columns(tile_column * (BN + REST), BN, REST)
        buffer = write(result0, out, staging, buffer, bias, has_bias, row, wide, n, ME, BN,
                       BUFFERS, LAYOUT)  # fmt: skip
        if REST > 0:
            REST_LAYOUT: gl.constexpr = wave_layout(REST, gl.num_ctas())
            buffer = write(result1, out, staging, buffer, bias, has_bias, row, rest, n, ME, REST,
                           BUFFERS, REST_LAYOUT)  # fmt: skip
        if TWO_WAVES:
            buffer = write(result1, out, staging, buffer, bias, has_bias, row + WAVE_ROWS, wide, n,
                           ME, BN, BUFFERS, LAYOUT)  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def paired_kernel(a, b, b_rest, a_scale_boxes, out, b_scales, bias, workspace, tickets, n,  # noqa: ARG001 - as dense_kernel
                  b_scale_stride, has_bias, row_tiles, column_tiles, all_blocks, items,
                  REST: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
                  BAND: gl.constexpr, SHARES_WEIGHTS: gl.constexpr, OVERLAP: gl.constexpr,
                  CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """A pair of programs takes items ``program_id, program_id + programs, ...`` (``pair_work``)."""
    BM: gl.constexpr = a.block_type.shape[0]
    BN: gl.constexpr = b.block_type.shape[0]
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
    # Twice the rows: half of them in each program (``epilogue``).
    staging = gl.allocate_shared_memory(
        out.dtype, [CONSUMERS * BUFFERS, 2 * WAVE_ROWS, out.block_type.shape[1]], out.layout
    )
    full, empty = allocate_barriers(STAGES, CONSUMERS)
    empty_in_both = gl.allocate_shared_memory(gl.int64, [STAGES, 1], pair_barrier_layout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(empty_in_both.index(slot), count=CONSUMERS)

    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty, rest_slots,
            rest_scale_slots, empty_in_both)  # fmt: skip
    operands = (a, b, b_rest, a_scale_boxes, b_scales, b_scale_stride)
    target = (out, staging, bias, has_bias)
    shape = (row_tiles, column_tiles, all_blocks, items)
    gl.warp_specialize(
        [
            (_consume, (ring, target, n, shape, 0, BM, BN, REST, STAGES, BUFFERS, BAND, TWO_WAVES,
                        SHARES_WEIGHTS)),
            (_consume, (ring, target, n, shape, 1, BM, BN, REST, STAGES, BUFFERS, BAND, TWO_WAVES,
                        SHARES_WEIGHTS)),
            (_produce, (ring, operands, shape, BM, BN, REST, STAGES, BAND, SHARES_WEIGHTS,
                        OVERLAP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
