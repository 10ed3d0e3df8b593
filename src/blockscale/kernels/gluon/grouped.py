"""The persistent kernel for groups: out[rows of g] = activation[rows of g] x weight[g]^T.

Structure and arithmetic are ``dense``'s: one producer warp, two consumers of four warps, 128 of K a
slot, sums promoted with one FFMA an element; so are the bits. What is new is where tiles come from:

- ``MASKED``: group g has ``routing[g]`` rows at the start of its own ``slot_rows`` rows.
- otherwise contiguous: the 128 rows of row block b belong to group ``routing[b]``; -1 is no group,
  and is skipped.

The producer finds them (``grouped_schedule``); nothing is read back to the host. A tile of 256 rows
whose halves belong to two groups becomes two of 128. Waves of 64 rows that hold nothing are not
multiplied and not stored. Rows of A beyond a group's are read (and give rows that nobody asked for
within the last wave); rows of another slot are never written: ``out`` has three axes, and TMA
stores nothing outside.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box, store_box
from blockscale.kernels.gluon.grouped_schedule import (
    allocate_mailbox,
    count_blocks,
    find_item,
    item_ends,
    post,
    read_counts,
    receive,
)
from blockscale.kernels.gluon.schedule import (
    WEIGHT_BLOCK,
    allocate_barriers,
    allocate_scale_slots,
    hand_over_scale,
    next_slot,
    tile_position,
)
from blockscale.kernels.gluon.waves import WAVE_ROWS, accumulate

K_BLOCK = gl.constexpr(128)
# Rows that belong to one group in the contiguous layout, and rows of one copy.
GROUP_ROWS = gl.constexpr(128)
CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)


@gluon.jit
def _fill(ring, operands, row, slot_row, scale_row, group, column, is_wide, all_blocks, slot, phase,
          BM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copy the slots of one tile: 128 rows of A, or 256 if ``is_wide``."""
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = ring
    a, b, a_scales, b_scales, n = operands
    fixed: gl.constexpr = b.block_type.nbytes + a_scales.block_type.nbytes
    half: gl.constexpr = a.block_type.nbytes
    weight_blocks = gl.cdiv(n, WEIGHT_BLOCK)
    b_scale = b_scales + (group * weight_blocks + column // WEIGHT_BLOCK) * all_blocks
    next_scale = gl.load(b_scale)
    b_row = group * n + column
    for block in range(all_blocks):
        scale = next_scale
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < all_blocks, 1, 0)
        next_scale = gl.load(b_scale)
        at = block * K_BLOCK
        barrier = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        if BM > GROUP_ROWS:
            mbarrier.expect(barrier, fixed + 2 * half, pred=is_wide)
            mbarrier.expect(barrier, fixed + half, pred=is_wide == 0)
        else:
            mbarrier.expect(barrier, fixed + half)
        load_box(b, [b_row, at], barrier, b_slots.index(slot))
        a_slot = a_slots.index(slot)
        load_box(a, [row, at], barrier, a_slot.slice(0, GROUP_ROWS, dim=0))
        if BM > GROUP_ROWS:
            lower = a_slot.slice(GROUP_ROWS, GROUP_ROWS, dim=0)
            load_box(a, [row + GROUP_ROWS, at], barrier, lower, pred=is_wide)
        load_box(a_scales, [scale_row + block, slot_row], barrier, a_scale_slots.index(slot))
        hand_over_scale(scale, b_scale_slots, full, slot)
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _produce_contiguous(ring, operands, mailbox, routing, slot_rows, all_blocks,
                        BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                        BAND: gl.constexpr):  # fmt: skip
    """The producer partition: tiles of neighbouring rows, cut where the group changes."""
    PARTS: gl.constexpr = BM // GROUP_ROWS
    columns = gl.cdiv(operands[4], BN)
    row_blocks = count_blocks(routing, slot_rows // GROUP_ROWS)
    row_tiles = gl.cdiv(row_blocks, PARTS)
    slot = 0
    phase = 1
    place = 0
    post_phase = 1
    for item in range(gl.program_id(0), row_tiles * columns, gl.num_programs(0)):
        row_tile, column_tile = tile_position(item, row_tiles, columns, BAND)
        column = column_tile * BN
        block = row_tile * PARTS
        group = gl.load(routing + block)
        other = group
        is_wide = False
        if PARTS > 1:
            other = gl.load(routing + block + 1, mask=block + 1 < row_blocks, other=-1)
            is_wide = other == group
        for part in range(PARTS):
            part_group = gl.where(part == 0, group, other)
            if (part_group >= 0) & ((part == 0) | (is_wide == 0)):
                row = (block + part) * GROUP_ROWS
                rows = gl.where(is_wide, BM, GROUP_ROWS)
                place, post_phase = post(mailbox, place, post_phase, rows, 0, row, column)
                slot, phase = _fill(ring, operands, row, row, 0, part_group, column, is_wide,
                                    all_blocks, slot, phase, BM, STAGES)  # fmt: skip
    post(mailbox, place, post_phase, 0, 0, 0, 0)


@gluon.jit
def _produce_masked(ring, operands, mailbox, routing, slot_rows, groups, all_blocks,
                    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
                    GROUPS: gl.constexpr):  # fmt: skip
    """The producer partition: each group's tiles, group after group."""
    columns = gl.cdiv(operands[4], BN)
    rows_of = read_counts(routing, groups, slot_rows, GROUPS)
    ends = item_ends(rows_of, columns, BM)
    items = gl.max(ends, 0)
    slot = 0
    phase = 1
    place = 0
    post_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        group, own_item, own_rows = find_item(item, ends, rows_of, GROUPS)
        row_tile, column_tile = tile_position(own_item, gl.cdiv(own_rows, BM), columns, BAND)
        column = column_tile * BN
        slot_row = row_tile * BM
        rows = gl.minimum(own_rows - slot_row, BM)
        place, post_phase = post(mailbox, place, post_phase, rows, group, slot_row, column)
        slot, phase = _fill(ring, operands, group * slot_rows + slot_row, slot_row,
                            group * all_blocks, group, column, rows > GROUP_ROWS, all_blocks, slot,
                            phase, BM, STAGES)  # fmt: skip
    post(mailbox, place, post_phase, 0, 0, 0, 0)


@gluon.jit
def _produce(ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BM: gl.constexpr,
             BN: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, MASKED: gl.constexpr,
             GROUPS: gl.constexpr):  # fmt: skip
    if MASKED:
        _produce_masked(ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BM, BN,
                        STAGES, BAND, GROUPS)  # fmt: skip
    else:
        _produce_contiguous(ring, operands, mailbox, routing, slot_rows, all_blocks, BM, BN, STAGES,
                            BAND)  # fmt: skip


@gluon.jit
def _store(result, out, staging, buffer, slot, row, column, ME: gl.constexpr, BN: gl.constexpr,
           BUFFERS: gl.constexpr):  # fmt: skip
    """Round one wave's rows to the output's dtype and start their store."""
    target = staging.index(ME * BUFFERS + buffer)
    # Stores are issued in the order of the buffers: this buffer's last one has been read.
    tma.store_wait(BUFFERS - 1)
    target.reshape((WAVE_ROWS, BN)).store(result.to(out.dtype))
    fence_async_shared()
    store_box(out, [slot, row, column], target)
    return (buffer + 1) % BUFFERS


@gluon.jit
def _skip(ring, blocks, slot, phase, STAGES: gl.constexpr):
    """Give back the slots of a tile that has no rows for this consumer."""
    full, empty = ring[4], ring[5]
    for _ in range(blocks):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _consume(ring, mailbox, target, all_blocks, ME: gl.constexpr,
             BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             BUFFERS: gl.constexpr):  # fmt: skip
    """A consumer partition, number ``ME`` of two: its half of a tile's rows, if there are any."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32]
    )
    WIDE_OWN: gl.constexpr = ME * GROUP_ROWS
    OWN: gl.constexpr = ME * WAVE_ROWS
    out, staging = target
    slot = 0
    phase = 0
    buffer = 0
    rows, out_slot, row, column, place, read_phase = receive(mailbox, 0, 0, CONSUMER_WARPS)
    while rows > 0:
        if (BM > GROUP_ROWS) and rows > GROUP_ROWS:
            if (ME == 0) or rows > WIDE_OWN + WAVE_ROWS:
                result0, result1, slot, phase = accumulate(
                    ring, all_blocks, slot, phase, WIDE_OWN, BN, 0, STAGES, True, LAYOUT
                )
                buffer = _store(result0, out, staging, buffer, out_slot, row + WIDE_OWN, column, ME,
                                BN, BUFFERS)  # fmt: skip
                buffer = _store(result1, out, staging, buffer, out_slot, row + WIDE_OWN + WAVE_ROWS,
                                column, ME, BN, BUFFERS)  # fmt: skip
            else:
                result0, result1, slot, phase = accumulate(
                    ring, all_blocks, slot, phase, WIDE_OWN, BN, 0, STAGES, False, LAYOUT
                )
                buffer = _store(result0, out, staging, buffer, out_slot, row + WIDE_OWN, column, ME,
                                BN, BUFFERS)  # fmt: skip
        elif rows > OWN:
            result0, result1, slot, phase = accumulate(
                ring, all_blocks, slot, phase, OWN, BN, 0, STAGES, False, LAYOUT
            )
            buffer = _store(result0, out, staging, buffer, out_slot, row + OWN, column, ME, BN,
                            BUFFERS)  # fmt: skip
        else:
            slot, phase = _skip(ring, all_blocks, slot, phase, STAGES)
        rows, out_slot, row, column, place, read_phase = receive(
            mailbox, place, read_phase, CONSUMER_WARPS
        )
    tma.store_wait(0)


@gluon.jit
def grouped_kernel(a, b, a_scale_boxes, out, b_scales, routing, n, slot_rows, groups,
                   all_blocks, BM: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
                   BAND: gl.constexpr, MASKED: gl.constexpr, GROUPS: gl.constexpr,
                   OVERLAP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
                   PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """One program a multiprocessor takes every so-many-th item of what ``routing`` says there is.

    ``a``: (slots x slot_rows, k) by boxes of 128 rows; ``a_scale_boxes``: (slots x blocks, rows) by
    BM; ``b``: (groups x n, k); ``out``: (slots, slot_rows, n) by one wave. Contiguous: one slot.
    GROUPS: a power of two, at least ``groups`` and 32 (masked only).
    """
    BN: gl.constexpr = b.block_type.shape[0]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BM, K_BLOCK], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, BN, K_BLOCK], b.layout)
    a_scale_slots = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], a_scale_boxes.layout)
    b_scale_slots = allocate_scale_slots(STAGES)
    staging = gl.allocate_shared_memory(
        out.dtype, [CONSUMERS * BUFFERS, 1, WAVE_ROWS, BN], out.layout
    )
    full, empty = allocate_barriers(STAGES, CONSUMERS)
    mailbox = allocate_mailbox(CONSUMERS)

    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty)
    operands = (a, b, a_scale_boxes, b_scales, n)
    target = (out, staging)
    gl.warp_specialize(
        [
            (_consume, (ring, mailbox, target, all_blocks, 0, BM, BN, STAGES, BUFFERS)),
            (_consume, (ring, mailbox, target, all_blocks, 1, BM, BN, STAGES, BUFFERS)),
            (_produce, (ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BM, BN,
                        STAGES, BAND, MASKED, GROUPS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
