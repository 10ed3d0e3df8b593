"""Which tile and split serve (M, N, K): a pure function.

Candidates are compared by ``costs``, an analytic model, corrected by what a sweep measured
(``corrections``); an (N, K) that was in the sweep takes what was fastest there. Needs neither torch
nor Triton; ``product`` asks once for each M and keeps the answer.

``benchmarks/gluon_sweep.py`` times every candidate; ``benchmarks/gluon_fit.py`` makes the table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import bucket
from blockscale.kernels.gluon.corrections import clocks, winner
from blockscale.kernels.gluon.work import (
    WAVE_ROWS,
    DenseWork,
    SmallWork,
    dense_variant,
    dense_work,
    small_variant,
    small_work,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.kernels.gluon.work import DenseVariant, SmallVariant, Work

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
PIECES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
# The model is trusted this far.
FAR = 1.7
# A shorter piece is all latency (estimate).
MIN_PIECE_BLOCKS = 4


def choose(m: int, n: int, k: int, out_bytes: int, processors: int) -> Work:
    """What serves ``m`` tokens of an (n, k) weight; ``out_bytes`` is 2 or 4. Needs m, n, k >= 1.

    ``processors``: the device's multiprocessors. An answer takes 0.4 to 2 ms of Python (AMD EPYC, 2
    CPUs, 2026-11-25) and is kept; beyond ``SMALL_M`` tokens one answer serves a bucket of 16, whose
    candidates are the same.
    """
    return _chosen(m if m <= SMALL_M else bucket(m), n, k, out_bytes, processors)


@lru_cache(maxsize=8192)
def _chosen(m: int, n: int, k: int, out_bytes: int, processors: int) -> Work:
    found = candidates(m, n, k, out_bytes, processors)
    known = winner(found, m, (n, k), out_bytes, processors)
    return known or min(found, key=lambda work: clocks(work, m, n, out_bytes, processors))


def candidates(m: int, n: int, k: int, out_bytes: int, processors: int) -> tuple[Work, ...]:
    """Everything that ``choose`` compares, without repetitions."""
    found: list[Work] = []
    if m <= MAX_SMALL_M:
        found += _small_candidates(m, n, k, out_bytes)
    if m >= FEW_M:
        found += _dense_candidates(m, n, k, out_bytes, processors)
    return tuple(dict.fromkeys(found))


def promising(
    m: int, n: int, k: int, out_bytes: int, processors: int, far: float = FAR
) -> list[Work]:
    """The candidates that the model does not hold for ``far`` times the choice's: to be timed."""
    found = candidates(m, n, k, out_bytes, processors)
    costs = [clocks(work, m, n, out_bytes, processors) for work in found]
    return [work for work, cost in zip(found, costs, strict=True) if cost <= far * min(costs)]


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


def _small_candidates(m: int, n: int, k: int, out_bytes: int) -> Iterator[SmallWork]:
    tokens = next((tile for tile in TOKEN_TILES if m <= tile), TOKEN_TILES[-1])
    for weights in WEIGHT_TILES:
        yield small_work(small_variant(weights, tokens, out_bytes, split=False), m, n, k, 1)
        splitting = small_variant(weights, tokens, out_bytes, split=True)
        for pieces in PIECES:
            work = small_work(splitting, m, n, k, pieces)
            if work.pieces > 1 and work.piece_blocks >= MIN_PIECE_BLOCKS:
                yield work
