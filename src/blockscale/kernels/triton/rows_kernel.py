"""Rows of experts: where they go, quantizing them on the way, and their sum for each token.

Their twins are in ``blockscale.reference.experts``, bit for bit. A row whose ``source`` is -1 is
padding: nothing is read for it, and what is written there means nothing.

OVERLAP: a kernel may be launched while the one ahead of it in the stream still runs (programmatic
dependent launch). That each of them ``start``s, before it reads or writes anything, is all that
memory order needs. The wait returns when the kernel ahead has ended and its writes are visible (PTX
ISA, griddepcontrol). That kernel was launched without overlap, after all before it had ended, or it
waited too: so all kernels before this one have ended, not just the last. A layer's are, in order:

- ``count`` reads ids, writes counts;
- ``arrange`` reads ids and counts, writes source, place and groups;
- gather reads source and the tokens, writes codes and scales;
- w13's product reads those and groups, writes gate_up (Gluon's waits too, Triton's is no overlap);
- activate reads gate_up, and source from four kernels ago, writes codes and scales;
- w2's product reads those, and groups from four kernels ago, writes products;
- ``combine`` reads products, place from five kernels ago and weights, writes the result.

What they write may be memory that an older kernel still read when the host gave it out again: that
kernel has ended as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.arithmetic import quantize_blocks, rounded_to, silu
from blockscale.kernels.triton.quantize_kernel import locate_tile, start
from blockscale.kernels.triton.scales import store_scales
from blockscale.reference import experts as reference

ABSENT = tl.constexpr(reference.ABSENT)
OVERFLOW = tl.constexpr(reference.OVERFLOW)


@triton.jit
def count_kernel(ids, counts, choices, CHUNK: tl.constexpr, OVERLAP: tl.constexpr):
    """counts[e] = how many of the ``choices`` ids are e; program e."""
    start(OVERLAP)
    expert = tl.program_id(0)
    total = 0
    for first in range(0, choices, CHUNK):
        place = first + tl.arange(0, CHUNK)
        found = tl.load(ids + place, mask=place < choices, other=-1)
        total += tl.sum((found == expert).to(tl.int32), 0)
    tl.store(counts + expert, total)


@triton.jit
def arrange_kernel(
    ids,
    counts,
    source,
    place,
    groups,
    choices,
    experts,
    rows,
    slot,
    IS_MASKED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``reference.arrange_contiguous`` or ``arrange_masked``; a program for each expert and one.

    The last program takes what belongs to no expert: ids outside the stack and the rows behind the
    last one. EXPERTS: a power of two, at least ``experts``. Rows of an expert are found in order,
    by a running count over the ids: no atomics, the same bits on every run.
    """
    start(OVERLAP)
    expert = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    every = tl.load(counts + each, mask=each < experts, other=0)
    if IS_MASKED:
        begin = expert * slot
        end = tl.minimum(begin + slot, rows)
    else:
        padded = (every + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        begin = tl.sum(tl.where(each < expert, padded, 0), 0)
        end = begin + tl.sum(tl.where(each == expert, padded, 0), 0)
        end = tl.where(expert == experts, rows, end)
    is_last = expert == experts
    done = 0
    for first in range(0, choices, CHUNK):
        choice = first + tl.arange(0, CHUNK)
        is_choice = choice < choices
        found = tl.load(ids + choice, mask=is_choice, other=-1)
        is_absent = (found < 0) | (found >= experts)
        is_mine = is_choice & tl.where(is_last, is_absent, found == expert)
        rank = done + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        done += tl.sum(is_mine.to(tl.int32), 0)
        row = begin + rank
        fits = row < end
        placed = tl.where(is_last, ABSENT, tl.where(fits, row, OVERFLOW))
        tl.store(place + choice, placed.to(tl.int32), mask=is_mine)
        is_here = is_mine & fits & (expert < experts)
        tl.store(source + row, choice.to(tl.int32), mask=is_here)
    used = tl.where(is_last, 0, tl.minimum(done, end - begin))
    for first in range(begin + used, end, CHUNK):
        row = first + tl.arange(0, CHUNK)
        tl.store(source + row, tl.full((CHUNK,), -1, tl.int32), mask=row < end)
    if IS_MASKED:
        if expert < experts:
            tl.store(groups + expert, used)
    else:
        mine = tl.where(is_last, -1, expert)
        for first in range(begin // ALIGNMENT, end // ALIGNMENT, CHUNK):
            block = first + tl.arange(0, CHUNK)
            owner = tl.full((CHUNK,), 0, tl.int32) + mine
            tl.store(groups + block, owner, mask=block < end // ALIGNMENT)


@triton.jit
def store_rows(
    values,
    codes,
    scales,
    place,
    extents,
    scale_strides,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
):
    """Quantize float32 ``values`` (rows, blocks, BLOCK) of one slot; write codes and scales.

    ``place``: (row, is_row, block, column). ``extents``: (columns, slot, stored blocks).
    ``scale_strides``: of a row, of a block or word, of a slot. All rows lie in one slot.
    """
    row, is_row, block, column = place
    columns, slot, stored_blocks = extents
    row_stride, block_stride, slot_stride = scale_strides
    quotients, scale_codes = quantize_blocks(values, IS_UE8M0, IS_HALF)
    tl.store(
        codes + row.to(tl.int64)[:, None, None] * columns + column,
        quotients,
        mask=(column < columns) & is_row[:, None, None],
    )
    which = tl.min(row, 0) // slot
    limits = (slot, tl.cdiv(columns, BLOCK), slot, stored_blocks)
    store_scales(
        scales + which.to(tl.int64) * slot_stride,
        scale_codes,
        row - which * slot,
        block,
        limits,
        (row_stride, block_stride),
        SCALE_KIND,
    )


@triton.jit
def gather_quantize_kernel(
    values,
    source,
    codes,
    scales,
    rows,
    columns,
    values_stride,
    choices,
    slot,
    stored_blocks,
    scale_row_stride,
    scale_block_stride,
    scale_slot_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each row's token of ``values`` (tokens, columns), quantized: ``choices`` for each token."""
    start(OVERLAP)
    tile = tl.program_id(0)
    row, block, column = locate_tile(tile, columns, 0, TILE_ROWS, TILE_COLUMNS, BLOCK)
    choice = tl.load(source + row, mask=row < rows, other=-1)
    if tl.max(choice, 0) >= 0:
        token = (choice // choices).to(tl.int64)
        is_row = choice >= 0
        loaded = tl.load(
            values + token[:, None, None] * values_stride + column,
            mask=(column < columns) & is_row[:, None, None],
            other=0.0,
        )
        store_rows(
            loaded.to(tl.float32),
            codes,
            scales,
            (row, is_row, block, column),
            (columns, slot, stored_blocks),
            (scale_row_stride, scale_block_stride, scale_slot_stride),
            BLOCK,
            IS_UE8M0,
            SCALE_KIND,
            IS_HALF,
        )


@triton.jit
def silu_multiply_quantize_rows_kernel(
    gate_up,
    source,
    codes,
    scales,
    rows,
    columns,
    slot,
    stored_blocks,
    scale_row_stride,
    scale_block_stride,
    scale_slot_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """silu(gate) * up of ``gate_up`` (rows, 2 columns), contiguous, quantized row for row."""
    start(OVERLAP)
    tile = tl.program_id(0)
    row, block, column = locate_tile(tile, columns, 0, TILE_ROWS, TILE_COLUMNS, BLOCK)
    choice = tl.load(source + row, mask=row < rows, other=-1)
    if tl.max(choice, 0) >= 0:
        is_row = choice >= 0
        is_data = (column < columns) & is_row[:, None, None]
        places = gate_up + row.to(tl.int64)[:, None, None] * (2 * columns) + column
        gate = tl.load(places, mask=is_data, other=0.0).to(tl.float32)
        up = tl.load(places + columns, mask=is_data, other=0.0).to(tl.float32)
        DTYPE: tl.constexpr = gate_up.dtype.element_ty
        store_rows(
            rounded_to(rounded_to(silu(gate), DTYPE) * up, DTYPE),
            codes,
            scales,
            (row, is_row, block, column),
            (columns, slot, stored_blocks),
            (scale_row_stride, scale_block_stride, scale_slot_stride),
            BLOCK,
            IS_UE8M0,
            SCALE_KIND,
            IS_HALF,
        )


@triton.jit
def combine_kernel(
    products,
    place,
    weights,
    out,
    columns,
    choices,
    TILE_COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum over choices of weights[t, j] * products[place[t, j]], as the reference adds.

    Built without contraction: each product and each sum is rounded.
    """
    start(OVERLAP)
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    token = (tl.program_id(0) // tiles_across).to(tl.int64)
    column = tl.program_id(0) % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_row = column < columns
    total = tl.zeros((TILE_COLUMNS,), tl.float32)
    for choice in range(choices):
        row = tl.load(place + token * choices + choice)
        weight = tl.load(weights + token * choices + choice).to(tl.float32)
        if row >= 0:
            product = tl.load(
                products + row.to(tl.int64) * columns + column, mask=in_row, other=0.0
            )
            total = total + product.to(tl.float32) * weight
        elif row == OVERFLOW:
            total = total + float("nan")
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=in_row)
