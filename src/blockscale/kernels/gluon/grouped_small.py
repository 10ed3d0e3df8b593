"""The kernel for few rows a group: out[g]^T = weight[g] x activation[g]^T.

As in ``small_m`` weights take the rows of the tensor-core tile and tokens its columns, for reading
the weights is all that counts. Programs are persistent, two on a multiprocessor: the producer of
each goes from item to item, so that weights flow across the ends of tiles, and a group without
rows costs nothing but its count.

Arithmetic and bits are those of ``grouped`` and ``dense``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box
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
)
from blockscale.kernels.gluon.waves import accumulate_tokens

K_BLOCK = gl.constexpr(128)
WARP = gl.constexpr(32)
WARPS = gl.constexpr(4)
THREADS = gl.constexpr(128)
# Widest global store of a thread.
STORE_BYTES = gl.constexpr(16)


@gluon.jit
def _fill(ring, operands, row, slot_row, scale_row, group, weight_row, all_blocks, slot, phase,
          STAGES: gl.constexpr):  # fmt: skip
    """Copy the slots of one item."""
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = ring
    a, b, a_scales, b_scales, n = operands
    slot_bytes: gl.constexpr = (
        a.block_type.nbytes + b.block_type.nbytes + a_scales.block_type.nbytes
    )
    weight_blocks = gl.cdiv(n, WEIGHT_BLOCK)
    b_scale = b_scales + (group * weight_blocks + weight_row // WEIGHT_BLOCK) * all_blocks
    next_scale = gl.load(b_scale)
    b_row = group * n + weight_row
    for block in range(all_blocks):
        scale = next_scale
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < all_blocks, 1, 0)
        next_scale = gl.load(b_scale)
        at = block * K_BLOCK
        barrier = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(barrier, slot_bytes)
        load_box(b, [b_row, at], barrier, b_slots.index(slot))
        load_box(a, [row, at], barrier, a_slots.index(slot))
        load_box(a_scales, [scale_row + block, slot_row], barrier, a_scale_slots.index(slot))
        hand_over_scale(scale, b_scale_slots, full, slot)
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _produce_masked(ring, operands, mailbox, counts, slot_rows, groups, all_blocks,
                    BW: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
                    GROUPS: gl.constexpr):  # fmt: skip
    """The producer partition: each group's tiles, those that share weights one after the other."""
    rows_of = read_counts(counts, groups, slot_rows, GROUPS)
    ends = item_ends(rows_of, gl.cdiv(operands[4], BW), BT)
    items = gl.max(ends, 0)
    slot = 0
    phase = 1
    place = 0
    post_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        group, own_item, own_rows = find_item(item, ends, rows_of, GROUPS)
        token_tiles = gl.cdiv(own_rows, BT)
        token = own_item % token_tiles * BT
        weight_row = own_item // token_tiles * BW
        rows = own_rows - token
        place, post_phase = post(mailbox, place, post_phase, rows, group, token, weight_row)
        slot, phase = _fill(ring, operands, group * slot_rows + token, token, group * all_blocks,
                            group, weight_row, all_blocks, slot, phase, STAGES)  # fmt: skip
    post(mailbox, place, post_phase, 0, 0, 0, 0)


@gluon.jit
def _produce_contiguous(ring, operands, mailbox, block_groups, rows, all_blocks, BW: gl.constexpr,
                        BT: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The producer partition: each row block's tiles."""
    weight_tiles = gl.cdiv(operands[4], BW)
    items = count_blocks(block_groups, rows // BT) * weight_tiles
    slot = 0
    phase = 1
    place = 0
    post_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block = item // weight_tiles
        weight_row = item % weight_tiles * BW
        row = block * BT
        group = gl.load(block_groups + block)
        if group >= 0:
            place, post_phase = post(mailbox, place, post_phase, BT, 0, row, weight_row)
            slot, phase = _fill(ring, operands, row, row, 0, group, weight_row, all_blocks, slot,
                                phase, STAGES)  # fmt: skip
    post(mailbox, place, post_phase, 0, 0, 0, 0)


@gluon.jit
def _produce(ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BW: gl.constexpr,
             BT: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
             GROUPS: gl.constexpr):  # fmt: skip
    if MASKED:
        _produce_masked(ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BW, BT,
                        STAGES, GROUPS)  # fmt: skip
    else:
        _produce_contiguous(ring, operands, mailbox, routing, slot_rows, all_blocks, BW, BT, STAGES)


@gluon.jit
def _write(result, out, token, rows, weight_row, n, BW: gl.constexpr, BT: gl.constexpr):
    """Round, and store with neighbouring threads on neighbouring columns of ``out``, a slot."""
    OUT: gl.constexpr = out.dtype.element_ty
    WIDEST: gl.constexpr = STORE_BYTES // (OUT.primitive_bitwidth // 8)
    SHARE: gl.constexpr = BW * BT // THREADS
    VECTOR: gl.constexpr = min(WIDEST, SHARE)
    LANES: gl.constexpr = min(BW // VECTOR, WARP)
    STORE: gl.constexpr = gl.BlockedLayout([VECTOR, 1], [LANES, WARP // LANES], [1, WARPS], [0, 1])
    rounded = gl.convert_layout(result.to(OUT), STORE)
    columns = weight_row + gl.arange(0, BW, layout=gl.SliceLayout(1, STORE))
    tokens = gl.arange(0, BT, layout=gl.SliceLayout(0, STORE))
    inside = gl.expand_dims(columns < n, 1) & gl.expand_dims(tokens < rows, 0)
    pointers = out + gl.expand_dims(token + tokens, 0) * n + gl.expand_dims(columns, 1)
    gl.store(pointers, rounded, mask=inside)


@gluon.jit
def _consume(ring, mailbox, out, slot_stride, n, all_blocks, BW: gl.constexpr, BT: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """The consumer partition."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BT, 32]
    )
    slot = 0
    phase = 0
    rows, group, token, weight_row, place, read_phase = receive(mailbox, 0, 0, WARPS)
    while rows > 0:
        result, slot, phase = accumulate_tokens(
            ring, all_blocks, slot, phase, BW, BT, STAGES, LAYOUT
        )
        _write(result, out + group * slot_stride, token, rows, weight_row, n, BW, BT)
        rows, group, token, weight_row, place, read_phase = receive(
            mailbox, place, read_phase, WARPS
        )


@gluon.jit
def grouped_small_kernel(a, b, a_scale_boxes, out, b_scales, routing, slot_stride, n, slot_rows,
                         groups, all_blocks, STAGES: gl.constexpr, MASKED: gl.constexpr,
                         GROUPS: gl.constexpr, OVERLAP: gl.constexpr,
                         PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """Each program takes every so-many-th item: BW weight rows of a group by BT of its tokens.

    ``MASKED`` and contiguous as in ``grouped``, but that row blocks have BT rows. ``slot_stride``:
    elements of ``out`` from slot to slot (64 bits).
    """
    BW: gl.constexpr = b.block_type.shape[0]
    BT: gl.constexpr = a.block_type.shape[0]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BT, K_BLOCK], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, BW, K_BLOCK], b.layout)
    # A box is wider than BT where BT scales would not fill what TMA's alignment asks for.
    a_scale_slots = gl.allocate_shared_memory(
        gl.float32, [STAGES, 1, a_scale_boxes.block_type.shape[1]], a_scale_boxes.layout
    )
    b_scale_slots = allocate_scale_slots(STAGES)
    full, empty = allocate_barriers(STAGES, 1)
    mailbox = allocate_mailbox(1)

    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty)
    operands = (a, b, a_scale_boxes, b_scales, n)
    gl.warp_specialize(
        [
            (_consume, (ring, mailbox, out, slot_stride, n, all_blocks, BW, BT, STAGES)),
            (_produce, (ring, operands, mailbox, routing, slot_rows, groups, all_blocks, BW, BT,
                        STAGES, MASKED, GROUPS)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
