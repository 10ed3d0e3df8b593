"""The kernel for few tokens: out^T = weight x activation^T, so that no tensor-core row is wasted.

A wgmma has 64 rows whatever M is. Here weights take the rows and tokens the columns (8 to 64 of
them). Reading the weight is all that counts: several programs share a multiprocessor, each keeps
``STAGES`` slots of weights in flight, and K is split over programs until there are enough of them.
One warp copies, four multiply.

The rule for scales and for the order of sums is that of ``dense``; so are the bits, unless split.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.dialect import load_box
from blockscale.kernels.gluon.schedule import (
    allocate_barriers,
    allocate_scale_slots,
    first_weight_scale,
    hand_over_scale,
    next_slot,
)
from blockscale.kernels.gluon.split import add_pieces, draw_ticket, piece_offsets
from blockscale.kernels.gluon.waves import accumulate_tokens

K_BLOCK = gl.constexpr(128)
WARP = gl.constexpr(32)
WARPS = gl.constexpr(4)
THREADS = gl.constexpr(128)
# Widest global store of a thread.
STORE_BYTES = gl.constexpr(16)


@gluon.jit
def _produce(ring, operands, row, token, first_block, blocks, STAGES: gl.constexpr,
             OVERLAP: gl.constexpr):  # fmt: skip
    """The producer partition: copy K blocks into the ring.

    The first slots' weights are copied before the kernel ahead has ended: they are no result of it
    (``product`` says what this asks of who writes them).
    """
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = ring
    a, b, a_scales, b_scales, b_scale_stride = operands
    slot_bytes: gl.constexpr = (
        a.block_type.nbytes + b.block_type.nbytes + a_scales.block_type.nbytes
    )
    b_scale = first_weight_scale(b_scales, row, b_scale_stride, first_block)
    next_scale = gl.load(b_scale)
    early = first_block
    if OVERLAP:
        early = first_block + gl.minimum(blocks, STAGES)
        for block in range(first_block, early):
            ahead = block - first_block
            mbarrier.expect(full.index(ahead), slot_bytes)
            load_box(b, [row, block * K_BLOCK], full.index(ahead), b_slots.index(ahead))
        gdc_wait()
        gdc_launch_dependents()
    slot = 0
    phase = 1
    for block in range(first_block, first_block + blocks):
        scale = next_scale
        # The last round loads its own scale again, rather than beyond the end.
        b_scale += gl.where(block + 1 < first_block + blocks, 1, 0)
        next_scale = gl.load(b_scale)
        mbarrier.wait(empty.index(slot), phase)
        is_late = block >= early
        mbarrier.expect(full.index(slot), slot_bytes, pred=is_late)
        load_box(b, [row, block * K_BLOCK], full.index(slot), b_slots.index(slot), pred=is_late)
        load_box(a, [token, block * K_BLOCK], full.index(slot), a_slots.index(slot))
        load_box(a_scales, [block, token], full.index(slot), a_scale_slots.index(slot))
        hand_over_scale(scale, b_scale_slots, full, slot)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _write(result, out, bias, has_bias, place, m, n, BW: gl.constexpr, BT: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """Add the bias, round, and store with neighbouring threads on neighbouring columns of out."""
    row, token = place
    if has_bias != 0:
        rows = row + gl.arange(0, BW, layout=gl.SliceLayout(1, LAYOUT))
        added = gl.load(bias + rows, mask=rows < n, other=0.0).to(gl.float32)
        result += gl.expand_dims(added, 1)
    OUT: gl.constexpr = out.dtype.element_ty
    WIDEST: gl.constexpr = STORE_BYTES // (OUT.primitive_bitwidth // 8)
    SHARE: gl.constexpr = BW * BT // THREADS
    VECTOR: gl.constexpr = min(WIDEST, SHARE)
    LANES: gl.constexpr = min(BW // VECTOR, WARP)
    STORE: gl.constexpr = gl.BlockedLayout([VECTOR, 1], [LANES, WARP // LANES], [1, WARPS], [0, 1])
    rounded = gl.convert_layout(result.to(OUT), STORE)
    rows = row + gl.arange(0, BW, layout=gl.SliceLayout(1, STORE))
    tokens = token + gl.arange(0, BT, layout=gl.SliceLayout(0, STORE))
    inside = gl.expand_dims(rows < n, 1) & gl.expand_dims(tokens < m, 0)
    pointers = out + gl.expand_dims(tokens, 0) * n + gl.expand_dims(rows, 1)
    gl.store(pointers, rounded, mask=inside)


@gluon.jit
def _consume(ring, out, bias, has_bias, workspace, tickets, limits, place, part, piece, pieces,
             blocks, BW: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
             SPLIT: gl.constexpr):  # fmt: skip
    """The consumer partition."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BT, 32]
    )
    m, n = limits
    start = gl.to_tensor(0)
    result, _slot, _phase = accumulate_tokens(
        ring, blocks, start, gl.to_tensor(0), BW, BT, STAGES, LAYOUT
    )
    if SPLIT:
        first = workspace + part * pieces * (BW * BT)
        gl.store(first + piece * (BW * BT) + piece_offsets(BW, BT, LAYOUT), result)
        if draw_ticket(tickets + part) == pieces - 1:
            gl.store(tickets + part, 0)
            total = add_pieces(first, BW * BT, pieces, BW, BT, LAYOUT)
            _write(total, out, bias, has_bias, place, m, n, BW, BT, LAYOUT)
    else:
        _write(result, out, bias, has_bias, place, m, n, BW, BT, LAYOUT)


@gluon.jit
def small_m_kernel(a, b, a_scale_boxes, out, b_scales, bias, workspace, tickets, m, n,
                   b_scale_stride, has_bias, token_tiles, all_blocks, pieces, piece_blocks,
                   STAGES: gl.constexpr, SPLIT: gl.constexpr, OVERLAP: gl.constexpr,
                   PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """Program (part, piece): BW weight rows by BT tokens, and one piece of K.

    Parts that share weights follow one another, so that all but the first find them in L2.
    """
    BW: gl.constexpr = b.block_type.shape[0]
    BT: gl.constexpr = a.block_type.shape[0]
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BT, K_BLOCK], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, BW, K_BLOCK], b.layout)
    # A box is wider than BT where BT scales would not fill what TMA's alignment asks for.
    a_scale_slots = gl.allocate_shared_memory(
        gl.float32, [STAGES, 1, a_scale_boxes.block_type.shape[1]], a_scale_boxes.layout
    )
    b_scale_slots = allocate_scale_slots(STAGES)
    full, empty = allocate_barriers(STAGES, 1)

    part = gl.program_id(0)
    row = part // token_tiles * BW
    token = part % token_tiles * BT
    piece = gl.program_id(1)
    first_block = piece * piece_blocks
    blocks = gl.minimum(all_blocks - first_block, piece_blocks)
    ring = (a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty)
    operands = (a, b, a_scale_boxes, b_scales, b_scale_stride)
    gl.warp_specialize(
        [
            (_consume, (ring, out, bias, has_bias, workspace, tickets, (m, n), (row, token), part,
                        piece, pieces, blocks, BW, BT, STAGES, SPLIT)),
            (_produce, (ring, operands, row, token, first_block, blocks, STAGES, OVERLAP)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
