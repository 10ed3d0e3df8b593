"""Which tile and split serve (M, N, K): a pure function, an analytic model in clocks.

It compares candidates with one another; it does not predict microseconds. What it knows:

- tensor cores: 64 x n x 128 of FP8 take 2 n clocks (4096 multiply-adds a clock);
- L2: 64 bytes a clock to one multiprocessor, 6153 to all of them (DeepGEMM's calibration,
  heuristics/sm90.hpp: 8e6 / 1.3e3);
- memory: 4.27 TB/s on an H200 (baseline/h200.md), 2500 bytes a clock at 1.7 GHz;
- a consumer's own chain for each wave: its wgmma, its promotion, the way from one to the next;
- rounds: all programs take an item, then the next; the last round is seldom full;
- split sums: each piece writes float32 sums, and the last one of a tile reads them all.

The constants marked "estimate" come from facts/kernels.md 5 and 7, not from a measurement.
``benchmarks/gluon_sweep.py`` times every candidate: what the constants are to be fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from blockscale.kernels.gluon.work import (
    FLOAT_BYTES,
    K_BLOCK,
    NARROW_PER_FULL,
    WAVE_ROWS,
    DenseWork,
    SmallWork,
    Work,
    dense_variant,
    dense_work,
    small_variant,
    small_work,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.kernels.gluon.work import DenseVariant, SmallVariant

# Beyond MAX_SMALL_M the small-M kernel would read weights from L2 more than four times. Dense tiles
# of 64 rows are for FEW_M tokens and more, taller ones for more than SMALL_M.
FEW_M, SMALL_M, MAX_SMALL_M = 17, 64, 256
# Above this, tiles of 64 rows read each weight from L2 more than eight times.
MAX_LOW_M = 512
TOKEN_TILES = (8, 16, 32, 64)
WEIGHT_TILES = (64, 128)
DENSE_TILES = ((256, 128), (128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32))
# Tiles of two parts; their sums are not split.
PART_TILES = ((128, 192), (64, 192))
# These have a variant for a last column of half their width.
NARROW_TILES = ((256, 128), (128, 128))
SMALL_PROGRAMS_PER_PROCESSOR = 2
PIECES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
# The model is trusted this far.
FAR = 1.7
# A shorter piece is all latency (estimate).
MIN_PIECE_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """What one kernel's programs cost, in clocks and bytes a clock.

    ``start``: from the launch to the first wave. ``l2_of_one``, ``l2_of_all``: L2 to one and to all
    multiprocessors. ``publish``: fence and ticket after a piece's sums. ``reduce``: the first read
    of the others' sums. ``workspace``: writing and reading those.
    """

    start: float
    l2_of_one: float
    l2_of_all: float
    memory: float
    publish: float
    reduce: float
    workspace: float


SMALL = Costs(140.3, 247.7, 7792.0, 4955.0, 315.3, 1658.0, 17.0)
DENSE = Costs(2015.0, 63.8, 6683.0, 2999.0, 950.3, 70.4, 12.9)
# A small-M program's chain for one K block.
SMALL_BLOCK_CLOCKS = 295.4
# From a program's first copy to its first wave, and its end; how fast it writes results.
SMALL_TURN_CLOCKS = 781.6
SMALL_WRITE_RATE = 15.6
# From the end of a dense consumer's wave to the start of its next, beside its FFMAs.
WAVE_OVERHEAD_CLOCKS = 144.3
# Rounding and staging one wave's rows, beside their bytes.
WRITE_CLOCKS = 672.2


@lru_cache(maxsize=8192)
def choose(m: int, n: int, k: int, out_bytes: int, processors: int) -> Work:
    """What serves ``m`` tokens of an (n, k) weight; ``out_bytes`` is 2 or 4. Needs m, n, k >= 1.

    ``processors``: the device's multiprocessors.
    """
    return min(
        candidates(m, n, k, out_bytes, processors),
        key=lambda work: clocks(work, m, n, out_bytes, processors),
    )


def candidates(m: int, n: int, k: int, out_bytes: int, processors: int) -> tuple[Work, ...]:
    """Everything that ``choose`` compares, without repetitions."""
    found: list[Work] = []
    if m <= MAX_SMALL_M:
        found += _small_candidates(m, n, k, out_bytes)
    if m >= FEW_M:
        found += _dense_candidates(m, n, k, out_bytes, processors)
    return tuple(dict.fromkeys(found))


def promising(m: int, n: int, k: int, out_bytes: int, processors: int) -> list[Work]:
    """The candidates that the model does not hold for far slower than its choice: to be timed."""
    found = candidates(m, n, k, out_bytes, processors)
    costs = [clocks(work, m, n, out_bytes, processors) for work in found]
    return [work for work, cost in zip(found, costs, strict=True) if cost <= FAR * min(costs)]


def variants(out_bytes: int) -> tuple[DenseVariant | SmallVariant, ...]:
    """Every form that ``choose`` can ask for, whatever the shape."""
    found: list[DenseVariant | SmallVariant] = []
    for rows, columns in DENSE_TILES:
        found += [dense_variant(rows, columns, out_bytes, split=split) for split in (False, True)]
        if (rows, columns) in NARROW_TILES:
            found.append(dense_variant(rows, columns, out_bytes, narrow=True))
    found += _part_variants(out_bytes)
    for weights in WEIGHT_TILES:
        for tokens in TOKEN_TILES:
            found += [
                small_variant(weights, tokens, out_bytes, split=split) for split in (False, True)
            ]
    return tuple(found)


def _part_variants(out_bytes: int) -> list[DenseVariant]:
    return [dense_variant(rows, columns, out_bytes) for rows, columns in PART_TILES]


def clocks(work: Work, m: int, n: int, out_bytes: int, processors: int) -> float:
    """The model's time of one launch."""
    if isinstance(work, SmallWork):
        return _small_clocks(work, out_bytes, processors)
    k = work.k_blocks * K_BLOCK
    from_memory = (n * k + m * k + m * n * out_bytes) / DENSE.memory
    return DENSE.start + max(from_memory, _dense_clocks(work, out_bytes, processors))


def _dense_candidates(
    m: int, n: int, k: int, out_bytes: int, processors: int
) -> Iterator[DenseWork]:
    for variant in _part_variants(out_bytes):
        if _is_for(variant.rows, m):
            yield dense_work(variant, m, n, k, processors)
    for rows, columns in DENSE_TILES:
        if not _is_for(rows, m):
            continue
        plain = dense_variant(rows, columns, out_bytes)
        yield dense_work(plain, m, n, k, processors)
        if (rows, columns) in NARROW_TILES:
            narrow = dense_variant(rows, columns, out_bytes, narrow=True)
            with_narrow = dense_work(narrow, m, n, k, processors)
            if with_narrow.narrow_tiles:
                yield with_narrow
        splitting = dense_variant(rows, columns, out_bytes, split=True)
        for pieces in PIECES:
            work = dense_work(splitting, m, n, k, processors, pieces=pieces)
            if work.split_tiles and work.piece_blocks >= MIN_PIECE_BLOCKS:
                yield work


def _is_for(rows: int, m: int) -> bool:
    return m > SMALL_M if rows > WAVE_ROWS else m <= MAX_LOW_M


def _dense_clocks(work: DenseWork, out_bytes: int, processors: int) -> float:
    variant = work.variant
    write = variant.waves * (WRITE_CLOCKS + variant.columns * out_bytes)
    block = _dense_block_clocks(variant, variant.columns, work.programs, processors)
    whole = work.k_blocks * block + write
    total = ceil(work.whole_tiles / work.programs) * whole
    if work.split_tiles:
        tile_bytes = variant.rows * variant.columns * FLOAT_BYTES
        moved = tile_bytes / DENSE.workspace
        piece = work.piece_blocks * block + moved + DENSE.publish
        rounds = ceil(work.split_tiles * work.pieces / work.programs)
        total += rounds * piece + work.pieces * moved + DENSE.reduce + write
    if work.narrow_tiles:
        total += _narrow_clocks(work, whole, write)
    return total


def _narrow_clocks(work: DenseWork, whole: float, write: float) -> float:
    """What the narrow tiles add; the programs that idle in the last round take them first."""
    variant = work.variant
    # Few of them run at a time, beside whole tiles: each may have its multiprocessor's full rate.
    narrow = work.k_blocks * _dense_block_clocks(variant, variant.columns // 2, 1, 1) + write / 2
    idle = -work.whole_tiles % work.programs
    beside = min(NARROW_PER_FULL * idle, work.narrow_tiles)
    late = max(0.0, ceil(beside / max(idle, 1)) * narrow - whole)
    return late + ceil((work.narrow_tiles - beside) / work.programs) * narrow


def _dense_block_clocks(
    variant: DenseVariant, columns: int, programs: int, processors: int
) -> float:
    """One K block of one tile: the slowest of tensor cores, a consumer's chain, and L2."""
    beside = ceil(programs / processors)
    tensor = beside * variant.consumers * variant.waves * 2 * columns
    # 64 x columns results over 128 threads, one FFMA each.
    promotion = WAVE_ROWS * columns / 128
    waves = 2 if variant.rest else 1
    chain = variant.waves * (2 * columns + promotion + waves * WAVE_OVERHEAD_CLOCKS)
    rate = min(DENSE.l2_of_one, DENSE.l2_of_all / min(programs, processors))
    return max(tensor, chain, beside * (variant.rows + columns) * K_BLOCK / rate)


def _small_candidates(m: int, n: int, k: int, out_bytes: int) -> Iterator[SmallWork]:
    tokens = next((tile for tile in TOKEN_TILES if m <= tile), TOKEN_TILES[-1])
    for weights in WEIGHT_TILES:
        yield small_work(small_variant(weights, tokens, out_bytes, split=False), m, n, k, 1)
        splitting = small_variant(weights, tokens, out_bytes, split=True)
        for pieces in PIECES:
            work = small_work(splitting, m, n, k, pieces)
            if work.pieces > 1 and work.piece_blocks >= MIN_PIECE_BLOCKS:
                yield work


def _small_clocks(work: SmallWork, out_bytes: int, processors: int) -> float:
    variant = work.variant
    places = SMALL_PROGRAMS_PER_PROCESSOR * processors
    programs = work.parts * work.pieces
    rounds, rest = divmod(programs, places)
    elements = variant.weights * variant.tokens
    write = elements * out_bytes / SMALL_WRITE_RATE
    moved = elements * FLOAT_BYTES / SMALL.workspace
    # Programs end and others start: nothing is prefetched across.
    turn = SMALL_TURN_CLOCKS + (write if work.pieces == 1 else SMALL.publish + moved)
    total = SMALL.start + rounds * (_small_piece_clocks(work, places, processors) + turn)
    if rest:
        total += _small_piece_clocks(work, rest, processors) + turn
    if work.pieces > 1:
        total += SMALL.reduce + work.pieces * moved + write
    return total


def _small_piece_clocks(work: SmallWork, programs: int, processors: int) -> float:
    """All K blocks of ``programs`` programs that run together."""
    variant = work.variant
    weight_bytes = variant.weights * K_BLOCK
    slot_bytes = weight_bytes + variant.tokens * K_BLOCK
    busy = min(programs, processors)
    rate = min(SMALL.l2_of_one, SMALL.l2_of_all / busy)
    beside = ceil(programs / processors)
    promotion = variant.weights * variant.tokens / 128
    chain = SMALL_BLOCK_CLOCKS + 2 * variant.tokens * variant.weights / WAVE_ROWS + promotion
    from_memory = programs * weight_bytes / work.token_tiles / SMALL.memory
    block = max(chain, from_memory, beside * slot_bytes / rate)
    return work.piece_blocks * block
