"""What a launch takes, in clocks: an analytic model that compares candidates with one another.

It does not predict microseconds. What it knows:

- tensor cores: 64 x n x 128 of FP8 take 2 n clocks (4096 multiply-adds a clock);
- L2: so many bytes a clock to one multiprocessor and to all of them;
- memory: 2.9 TB/s on an H100, 1700 bytes a clock at 1.7 GHz;
- a consumer's own chain for each wave: its wgmma, its promotion, the way from one to the next;
- slots: a slot is filled, used and filled again; with few of them the copies' latency shows
  (64x128 with three slots takes 700 clocks a K block, its chain 430);
- rows beyond M: TMA fills them with zeros, about 12 clocks a row (128x64 tiles at M = 320 take 1.5
  times as long as at M = 384, whose rows are all there; docs/perf-log.md G17);
- rounds: all programs take an item, then the next; the last round is seldom full;
- split sums: each piece writes float32 sums, and the last one of a tile reads them all.

The constants are rounded from a least-squares fit to the H100's sweep. What they leave is corrected
by tile (``corrections``), so that they need not be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import Estimate, together
from blockscale.kernels.gluon.work import (
    BAND,
    FLOAT_BYTES,
    K_BLOCK,
    NARROW_PER_FULL,
    WAVE_ROWS,
    DenseWork,
    SmallWork,
)

if TYPE_CHECKING:
    from blockscale.kernels.gluon.work import DenseVariant, Work

# Threads of a consumer: one FFMA each a clock.
THREADS = 128
SMALL_PROGRAMS_PER_PROCESSOR = 2

# Bytes a clock.
L2_OF_ONE, L2_OF_ALL, MEMORY = 80.0, 7000.0, 1600.0
# From asking for a K block to having it.
LATENCY = 1000.0
# Of one row that TMA fills with zeros. Beside what else the block takes it counts for half of the
# 12 clocks that such a row takes alone.
OUTSIDE_ROW_CLOCKS = 6.0
# Limits that are near one another hinder one another: sums of this power.
BLOCK_POWER, MEMORY_POWER = 3.0, 2.4


@dataclass(frozen=True, slots=True)
class Costs:
    """What one kernel's programs cost beside their K blocks, in clocks and bytes a clock.

    ``start``: from the launch to the first wave. ``publish``: fence and ticket after a piece's
    sums. ``reduce``: the first read of the others' sums. ``workspace``: writing and reading those.
    """

    start: float
    publish: float
    reduce: float
    workspace: float


SMALL = Costs(500.0, 650.0, 850.0, 25.0)
DENSE = Costs(2800.0, 1000.0, 350.0, 16.0)
# A small-M program's chain for one K block, beside its wgmma and FFMAs.
SMALL_BLOCK_CLOCKS = 180.0
# From a program's first copy to its first wave, and its end; how fast it writes results.
SMALL_TURN_CLOCKS, SMALL_WRITE_RATE = 1750.0, 18.0
# From the end of a dense consumer's wave to the start of its next, beside its FFMAs; more if a tile
# has two parts.
WAVE_OVERHEAD_CLOCKS, PART_CLOCKS = 40.0, 60.0
# Rounding and staging one wave's rows, and one of their columns.
WRITE_CLOCKS, WRITE_COLUMN_CLOCKS = 150.0, 0.5
# Until the first slot is full, by its bytes.
FIRST_SLOT_RATE = 50.0
# Two consumers that write sums at the same time take longer than one, not twice as long.
BOTH_CONSUMERS = 0.65


def estimate(work: Work, m: int, n: int, out_bytes: int, processors: int) -> Estimate:
    """The model's time of one launch."""
    k = work.k_blocks * K_BLOCK
    memory = (n * k + m * k + m * n * out_bytes) / MEMORY
    if isinstance(work, SmallWork):
        return Estimate(_small_clocks(work, m, out_bytes, processors), memory)
    variant = work.variant
    first_slot = (variant.rows + variant.columns) * K_BLOCK / FIRST_SLOT_RATE
    body = _dense_clocks(work, m, processors)
    return Estimate(DENSE.start + first_slot + together(MEMORY_POWER, body, memory), memory)


def outside_share(work: Work, m: int, processors: int) -> float:
    """Rows beyond M of a tile that has some, as a share, times how many of its tiles have some.

    Of the program that has most: program p takes tiles p, p + programs, ..., so that it meets the
    last row of tiles always if the number of programs is a multiple of the rows of tiles.
    """
    if isinstance(work, SmallWork):
        rows, tiles, step = work.variant.tokens, work.token_tiles, processors
    else:
        rows, tiles, step = work.variant.rows, min(work.row_tiles, BAND), work.programs
    return gcd(step, tiles) / tiles * outside_rows(work, m) / rows


def outside_rows(work: Work, m: int) -> int:
    """Rows beyond M of the last tile of rows."""
    if isinstance(work, SmallWork):
        return work.token_tiles * work.variant.tokens - m
    return work.row_tiles * work.variant.rows - m


def _block(
    tile: tuple[int, int, int], chain: float, tensor: float, programs: int, processors: int
) -> float:
    """One K block of one tile of (rows, columns, slots); ``tensor``: of one program."""
    rows, columns, stages = tile
    beside = ceil(programs / processors)
    slot_bytes = (rows + columns) * K_BLOCK
    return together(
        BLOCK_POWER,
        chain,
        beside * tensor,
        beside * slot_bytes / L2_OF_ONE,
        min(programs, SMALL_PROGRAMS_PER_PROCESSOR * processors) * slot_bytes / L2_OF_ALL,
        (LATENCY + chain) / stages,
    )


def _with_outside(block: float, work: Work, m: int, programs: int, processors: int) -> float:
    """A block's mean over the tiles of the program that has most rows beyond M."""
    outside = outside_rows(work, m)
    if not outside:
        return block
    rows = work.variant.tokens if isinstance(work, SmallWork) else work.variant.rows
    share = outside_share(work, m, processors) * rows / outside
    filling = OUTSIDE_ROW_CLOCKS * outside * ceil(programs / processors)
    return share * together(BLOCK_POWER, block, filling) + (1 - share) * block


def _dense_clocks(work: DenseWork, m: int, processors: int) -> float:
    variant = work.variant
    tile = (variant.rows, variant.columns, variant.stages)
    tensor = 2 * variant.consumers * variant.waves * variant.columns
    block = _block(tile, _chain(variant, variant.columns), tensor, work.programs, processors)
    block = _with_outside(block, work, m, work.programs, processors)
    write = variant.waves * (WRITE_CLOCKS + variant.columns * WRITE_COLUMN_CLOCKS)
    whole = work.k_blocks * block + write
    total = ceil(work.whole_tiles / work.programs) * whole
    if work.split_tiles:
        moved = variant.rows * variant.columns * FLOAT_BYTES / DENSE.workspace
        if variant.consumers > 1:
            moved *= BOTH_CONSUMERS
        piece = work.piece_blocks * block + moved + DENSE.publish
        rounds = ceil(work.split_tiles * work.pieces / work.programs)
        total += rounds * piece + work.pieces * moved + DENSE.reduce + write
    if work.narrow_tiles:
        total += _narrow_clocks(work, whole, write)
    return total


def _chain(variant: DenseVariant, columns: int) -> float:
    """One consumer's waves of one K block, one after the other."""
    promotion = WAVE_ROWS * columns / THREADS
    parts = PART_CLOCKS if variant.rest else 0
    return variant.waves * (2 * columns + promotion + WAVE_OVERHEAD_CLOCKS) + parts


def _narrow_clocks(work: DenseWork, whole: float, write: float) -> float:
    """What the narrow tiles add; the programs that idle in the last round take them first."""
    variant = work.variant
    half = variant.columns // 2
    # Few of them run at a time, beside whole tiles: each may have its multiprocessor's full rate.
    tensor = variant.consumers * variant.waves * variant.columns
    tile = (variant.rows, half, variant.stages)
    narrow = work.k_blocks * _block(tile, _chain(variant, half), tensor, 1, 1) + write / 2
    idle = -work.whole_tiles % work.programs
    beside = min(NARROW_PER_FULL * idle, work.narrow_tiles)
    late = max(0.0, ceil(beside / max(idle, 1)) * narrow - whole)
    return late + ceil((work.narrow_tiles - beside) / work.programs) * narrow


def _small_clocks(work: SmallWork, m: int, out_bytes: int, processors: int) -> float:
    variant = work.variant
    places = SMALL_PROGRAMS_PER_PROCESSOR * processors
    rounds, rest = divmod(work.parts * work.pieces, places)
    elements = variant.weights * variant.tokens
    write = elements * out_bytes / SMALL_WRITE_RATE
    moved = elements * FLOAT_BYTES / SMALL.workspace
    # Programs end and others start: nothing is prefetched across.
    turn = SMALL_TURN_CLOCKS + (write if work.pieces == 1 else SMALL.publish + moved)
    total = SMALL.start
    if rounds:
        total += rounds * (_small_piece_clocks(work, m, places, processors) + turn)
    if rest:
        total += _small_piece_clocks(work, m, rest, processors) + turn
    if work.pieces > 1:
        total += SMALL.reduce + work.pieces * moved + write
    return total


def _small_piece_clocks(work: SmallWork, m: int, programs: int, processors: int) -> float:
    """All K blocks of ``programs`` programs that run together."""
    variant = work.variant
    tensor = 2 * variant.tokens * variant.weights / WAVE_ROWS
    chain = SMALL_BLOCK_CLOCKS + tensor + variant.weights * variant.tokens / THREADS
    tile = (variant.tokens, variant.weights, variant.stages)
    block = _block(tile, chain, tensor, programs, processors)
    block = _with_outside(block, work, m, programs, processors)
    from_memory = programs * variant.weights * K_BLOCK / work.token_tiles / MEMORY
    return work.piece_blocks * together(MEMORY_POWER, block, from_memory)
