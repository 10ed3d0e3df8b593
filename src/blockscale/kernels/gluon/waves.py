"""Device code: a consumer's share of one tile, wave by wave.

A wave is the float32 sum of 128 products per element, straight from the tensor cores. It is then
scaled and added to the result ("promoted") with one FFMA per element:

    result += wave * (activation_scale[row, k / 128] * weight_scale[column / 128, k / 128])

The scale product is rounded first, then the FFMA: each element has the same chain of operations in
every tile, so the same bits whatever tile serves it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from blockscale.kernels.gluon.dialect import in_each_program, partition_barrier
from blockscale.kernels.gluon.schedule import next_slot, release, slot_before, take_scale

# Rows of one wgmma.
WAVE_ROWS = gl.constexpr(64)


@gluon.constexpr_function
def wave_layout(columns, programs=1):
    """How the results of 64 rows x ``columns`` lie in a consumer's registers.

    ``programs``: of a cluster.
    """
    return gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, 1],
        instr_shape=[16, columns, 32],
        cga_layout=in_each_program(2, programs),
    )


@gluon.jit
def _promote(result, partial, scales):
    """``result += partial * scales`` by row, finished before the next wave is issued."""
    result += partial * gl.expand_dims(scales, 1)
    # Without this (free) wait LLVM moves the FFMAs below the next wgmma and the loop spills
    # 436-520 bytes (ptxas 13.0).
    return warpgroup_mma_wait(0, deps=(result,))


@gluon.jit
def _load_scales(ring, slot, FIRST: gl.constexpr, REST: gl.constexpr, TWO_WAVES: gl.constexpr,
                 ROWS: gl.constexpr):  # fmt: skip
    """A slot's scales of the first and of the second wave's rows: activation's times weight's."""
    a_scale_slots = ring[2]
    b_scale = take_scale(ring[3], slot, ROWS)
    slot_scales = a_scale_slots.index(slot).reshape((a_scale_slots.shape[2],))
    a_scale = slot_scales.slice(FIRST, WAVE_ROWS, dim=0).load(ROWS)
    scale0 = a_scale * b_scale
    scale1 = scale0
    if TWO_WAVES:
        scale1 = slot_scales.slice(FIRST + WAVE_ROWS, WAVE_ROWS, dim=0).load(ROWS) * b_scale
    if REST > 0:
        OTHER_ROWS: gl.constexpr = gl.SliceLayout(1, wave_layout(REST, gl.num_ctas()))
        scale1 = a_scale * take_scale(ring[7], slot, ROWS)
        scale1 = gl.convert_layout(scale1, OTHER_ROWS, assert_trivial=True)
    return scale0, scale1


@gluon.jit
def _multiply_block(ring, block, slot, following, following_phase, scales, results, partials,
                    FIRST: gl.constexpr, COLUMNS: gl.constexpr, REST: gl.constexpr,
                    STAGES: gl.constexpr, TWO_WAVES: gl.constexpr, ROWS: gl.constexpr,
                    PAIR: gl.constexpr, IS_LAST: gl.constexpr):  # fmt: skip
    """One K block of ``accumulate``: results, partial sums, and the following block's scales.

    The last block is a copy of its own behind the loop: what follows it may be being filled, so its
    scales are not read. A branch in the loop instead made tiles of two waves take 10 to 15 % more
    (``gemm.py``, H200, 2026-11-26).
    """
    full = ring[4]
    scale0, scale1 = scales
    this0, this1 = scales
    result0, result1 = results
    partial, rest_partial = partials
    a = ring[0].index(slot)
    b = ring[1].index(slot).slice(0, COLUMNS, dim=0).permute((1, 0))
    own = a.slice(FIRST, WAVE_ROWS, dim=0)
    partial = warpgroup_mma(own, b, partial, use_acc=False, is_async=True)
    release(ring, slot_before(slot, STAGES), block > 0, PAIR)
    # Triton's own barrier after an arrival would stand in front of the next wave.
    partition_barrier()
    if TWO_WAVES or REST > 0:
        partial = warpgroup_mma_wait(0, deps=(partial,))
        result0 = _promote(result0, partial, this0)
    if TWO_WAVES:
        lower = a.slice(FIRST + WAVE_ROWS, WAVE_ROWS, dim=0)
        partial = warpgroup_mma(lower, b, partial, use_acc=False, is_async=True)
    if REST > 0:
        rest = ring[6].index(slot).permute((1, 0))
        rest_partial = warpgroup_mma(own, rest, rest_partial, use_acc=False, is_async=True)
    if not IS_LAST:
        mbarrier.wait(full.index(following), following_phase)
        scale0, scale1 = _load_scales(ring, following, FIRST, REST, TWO_WAVES, ROWS)
    if REST > 0:
        rest_partial = warpgroup_mma_wait(0, deps=(rest_partial,))
        result1 = _promote(result1, rest_partial, this1)
    else:
        partial = warpgroup_mma_wait(0, deps=(partial,))
        if TWO_WAVES:
            result1 = _promote(result1, partial, this1)
        else:
            result0 = _promote(result0, partial, this0)
    return result0, result1, partial, rest_partial, scale0, scale1


@gluon.jit
def accumulate(ring, blocks, slot, phase, FIRST: gl.constexpr, COLUMNS: gl.constexpr,
               REST: gl.constexpr, STAGES: gl.constexpr, TWO_WAVES: gl.constexpr,
               LAYOUT: gl.constexpr, PAIR: gl.constexpr = False):  # fmt: skip
    """One consumer's rows of one tile, from row ``FIRST`` on: one or two float32 results.

    The second has the next 64 rows if ``TWO_WAVES``, or the tile's other ``REST`` columns.
    ``PAIR``: whoever fills the slots of two programs is told as well.

    Between the end of a wave and the start of the next stand its FFMAs and nothing else. While the
    tensor cores work, the slot before is released, the next one is waited for and its scales are
    loaded (docs/perf-log.md G12); not after the last block, for that slot may be being filled. One
    thread's arrival releases a slot: a barrier of the partition's warps, Triton's (3.6,
    ``Membar.cpp``) or after the last block ours, stands between it and what all of them read.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    full = ring[4]
    OTHER: gl.constexpr = REST if REST > 0 else COLUMNS
    OTHER_LAYOUT: gl.constexpr = wave_layout(OTHER, gl.num_ctas())
    result0 = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    result1 = gl.zeros((WAVE_ROWS, OTHER), gl.float32, OTHER_LAYOUT)
    # Two waves of one shape share their registers: 64 more would spill.
    partial = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    rest_partial = gl.zeros((WAVE_ROWS, OTHER), gl.float32, OTHER_LAYOUT)
    mbarrier.wait(full.index(slot), phase)
    scale0, scale1 = _load_scales(ring, slot, FIRST, REST, TWO_WAVES, ROWS)
    for block in range(blocks - 1):
        following, following_phase = next_slot(slot, phase, STAGES)
        result0, result1, partial, rest_partial, scale0, scale1 = _multiply_block(
            ring, block, slot, following, following_phase, (scale0, scale1), (result0, result1),
            (partial, rest_partial), FIRST, COLUMNS, REST, STAGES, TWO_WAVES, ROWS, PAIR,
            False)  # fmt: skip
        slot = following
        phase = following_phase
    result0, result1, partial, rest_partial, scale0, scale1 = _multiply_block(
        ring, blocks - 1, slot, slot, phase, (scale0, scale1), (result0, result1),
        (partial, rest_partial), FIRST, COLUMNS, REST, STAGES, TWO_WAVES, ROWS, PAIR,
        True)  # fmt: skip
    slot, phase = next_slot(slot, phase, STAGES)
    # One thread's wait for a wave is not that of the other warps, whose wgmmas read the slot too.
    partition_barrier()
    release(ring, slot_before(slot, STAGES), True, PAIR)
    return result0, result1, slot, phase


@gluon.jit
def _load_token_scales(ring, slot, BT: gl.constexpr, TOKENS: gl.constexpr):
    """A slot's scales by token: activation's times weight's."""
    _a_slots, _b_slots, a_scale_slots, b_scale_slots, _full, _empty = ring
    b_scale = take_scale(b_scale_slots, slot, TOKENS)
    scale_slot = a_scale_slots.index(slot).reshape((a_scale_slots.shape[2],))
    return scale_slot.slice(0, BT).load(TOKENS) * b_scale


@gluon.jit
def accumulate_tokens(ring, blocks, slot, phase, BW: gl.constexpr, BT: gl.constexpr,
                      STAGES: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Weights as rows, tokens as columns: the (BW, BT) sums; steps in ``accumulate``'s order."""
    TOKENS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    a_slots, b_slots, _a_scale_slots, _b_scale_slots, full, empty = ring
    result = gl.zeros((BW, BT), gl.float32, LAYOUT)
    partial = gl.zeros((BW, BT), gl.float32, LAYOUT)
    mbarrier.wait(full.index(slot), phase)
    scale = _load_token_scales(ring, slot, BT, TOKENS)
    for block in range(blocks):
        this = scale
        partial = warpgroup_mma(
            b_slots.index(slot), a_slots.index(slot).permute((1, 0)), partial, use_acc=False,
            is_async=True)  # fmt: skip
        mbarrier.arrive(empty.index(slot_before(slot, STAGES)), count=1, pred=block > 0)
        partition_barrier()
        following, following_phase = next_slot(slot, phase, STAGES)
        if block + 1 < blocks:
            mbarrier.wait(full.index(following), following_phase)
            scale = _load_token_scales(ring, following, BT, TOKENS)
        partial = warpgroup_mma_wait(0, deps=(partial,))
        result += partial * gl.expand_dims(this, 0)
        slot = following
        phase = following_phase
    mbarrier.arrive(empty.index(slot_before(slot, STAGES)), count=1)
    return result, slot, phase
