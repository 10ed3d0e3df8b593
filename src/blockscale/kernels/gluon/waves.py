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

from blockscale.kernels.gluon.schedule import next_slot

# Rows of one wgmma.
WAVE_ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)


@gluon.jit
def _wave(a, b, partial, turns, turn_phase, ME: gl.constexpr, ALTERNATE: gl.constexpr):
    """64 rows x 128 of K times the weight tile: the unscaled sums."""
    if ALTERNATE:
        mbarrier.wait(turns.index(ME), turn_phase)
    partial = warpgroup_mma(a, b, partial, use_acc=False, is_async=True)
    if ALTERNATE:
        mbarrier.arrive(turns.index(1 - ME), count=1)
    return warpgroup_mma_wait(0, deps=(partial,))


@gluon.jit
def _promote(result, partial, scales):
    """``result += partial * scales`` by row, finished before the next wave is issued."""
    result += partial * gl.expand_dims(scales, 1)
    # Without this (free) wait LLVM moves the FFMAs below the next wgmma and the loop spills
    # 436-520 bytes (ptxas 13.0, facts/kernels.md 2.5).
    return warpgroup_mma_wait(0, deps=(result,))


@gluon.jit
def accumulate(ring, turns, turn_phase, a_scales, a_scale_stride, m, row, first_block, blocks,
                slot, phase, ME: gl.constexpr, BM: gl.constexpr, COLUMNS: gl.constexpr,
                STAGES: gl.constexpr, TWO_WAVES: gl.constexpr, ALTERNATE: gl.constexpr,
                SCALES_BY_TMA: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """This consumer's rows of one tile: one or two (64, COLUMNS) float32 results."""
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    FIRST: gl.constexpr = ME * (BM // CONSUMERS)
    SECOND: gl.constexpr = FIRST + WAVE_ROWS
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = ring
    result0 = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    result1 = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    partial = gl.zeros((WAVE_ROWS, COLUMNS), gl.float32, LAYOUT)
    scale0 = gl.zeros((WAVE_ROWS,), gl.float32, ROWS)
    scale1 = gl.zeros((WAVE_ROWS,), gl.float32, ROWS)
    rows0 = row + FIRST + gl.arange(0, WAVE_ROWS, layout=ROWS)
    rows1 = rows0 + WAVE_ROWS
    pointers0 = a_scales + first_block * a_scale_stride + rows0
    pointers1 = pointers0 + WAVE_ROWS
    if not SCALES_BY_TMA:
        scale0 = gl.load(pointers0, mask=rows0 < m, other=0.0)
        if TWO_WAVES:
            scale1 = gl.load(pointers1, mask=rows1 < m, other=0.0)

    for block in range(blocks):
        mbarrier.wait(full.index(slot), phase)
        b_scale = b_scale_slots.index(slot).load(ROWS)
        if SCALES_BY_TMA:
            slot_scales = a_scale_slots.index(slot).reshape((a_scale_slots.shape[2],))
            scale0 = slot_scales.slice(FIRST, WAVE_ROWS, dim=0).load(ROWS)
            if TWO_WAVES:
                scale1 = slot_scales.slice(SECOND, WAVE_ROWS, dim=0).load(ROWS)
        a = a_slots.index(slot)
        b = b_slots.index(slot).slice(0, COLUMNS, dim=0).permute((1, 0))
        partial = _wave(a.slice(FIRST, WAVE_ROWS, dim=0), b, partial, turns, turn_phase, ME,
                        ALTERNATE)  # fmt: skip
        turn_phase ^= 1
        if not TWO_WAVES:
            mbarrier.arrive(empty.index(slot), count=1)
        product0 = scale0 * b_scale
        if not SCALES_BY_TMA:
            # The last round loads its own scales again, rather than beyond the end.
            step = gl.where(block + 1 < blocks, a_scale_stride, 0)
            pointers0 += step
            scale0 = gl.load(pointers0, mask=rows0 < m, other=0.0)
        result0 = _promote(result0, partial, product0)
        if TWO_WAVES:
            partial = _wave(a.slice(SECOND, WAVE_ROWS, dim=0), b, partial, turns, turn_phase, ME,
                            ALTERNATE)  # fmt: skip
            turn_phase ^= 1
            mbarrier.arrive(empty.index(slot), count=1)
            product1 = scale1 * b_scale
            if not SCALES_BY_TMA:
                pointers1 += step
                scale1 = gl.load(pointers1, mask=rows1 < m, other=0.0)
            result1 = _promote(result1, partial, product1)
        slot, phase = next_slot(slot, phase, STAGES)
    return result0, result1, turn_phase, slot, phase
