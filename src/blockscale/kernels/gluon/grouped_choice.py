"""Which kernel and tile serve a product over groups: pure functions of what the host knows.

Row counts are on the GPU; the host knows the number of groups and what a count is likely to be.
Whatever is chosen is right for any counts, only not as fast.

Rules, not yet a model: estimates from DeepGEMM's heuristics, the memory's bandwidth and the dense
kernels' measurements, to be replaced by what ``benchmarks/grouped.py --variants`` finds
(``benchmarks/grouped_fit.py`` reads it).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from blockscale.kernels.gluon.grouped_work import (
    GROUP_ROWS,
    AnyGroupedVariant,
    GroupedVariant,
    grouped_small_variant,
    grouped_variant,
)

# Row blocks of the contiguous layout that the kernel for few rows takes, beside GROUP_ROWS.
TOKEN_TILES = (8, 16, 32, 64)
WEIGHT_TILES = (64, 128)
WIDE_TILES = ((256, 128), (128, 128))
ALIGNMENTS = (*TOKEN_TILES, GROUP_ROWS)
# Up to here weights take the rows of the tensor-core tile: reading them is what takes the time.
MAX_FEW_ROWS = 64
# A tile of tokens is to hold this many times the likely count, so that most groups need one.
SPREAD = 1.5
# From here on most tiles of 256 rows lie within one group (estimate).
ROWS_FOR_WIDE_TILES = 512
# Above this, a tile of 256 rows has a count's last rows in it, and little of it is empty.
ROWS_FOR_WIDE_SLOTS = 128


@lru_cache(maxsize=8192)
def choose_contiguous(
    groups: int, blocks: int, alignment: int, n: int, out_bytes: int, processors: int
) -> AnyGroupedVariant:
    """What serves ``blocks`` row blocks of ``alignment`` rows (8, 16, 32, 64 or 128) of ``groups``.

    ``out_bytes`` is 2 or 4; ``processors``: the device's multiprocessors.
    """
    if alignment < GROUP_ROWS:
        return grouped_small_variant(WEIGHT_TILES[0], alignment, out_bytes)
    rows = blocks * alignment
    wide_items = ceil(rows / WIDE_TILES[0][0]) * ceil(n / WIDE_TILES[0][1])
    is_wide = rows >= ROWS_FOR_WIDE_TILES * groups and wide_items >= processors
    return grouped_variant(*WIDE_TILES[0 if is_wide else 1], out_bytes)


@lru_cache(maxsize=8192)
def choose_masked(
    groups: int, slot_rows: int, expected_rows: int, out_bytes: int
) -> AnyGroupedVariant:
    """What serves ``groups`` slots of ``slot_rows`` rows, of which ``expected_rows`` may count."""
    likely = max(1, min(expected_rows, slot_rows))
    if likely <= MAX_FEW_ROWS:
        enough = min(SPREAD * likely, slot_rows)
        tokens = next((tile for tile in TOKEN_TILES if enough <= tile), TOKEN_TILES[-1])
        return grouped_small_variant(WEIGHT_TILES[0], tokens, out_bytes, groups)
    rows, columns = WIDE_TILES[0 if likely > ROWS_FOR_WIDE_SLOTS else 1]
    return grouped_variant(rows, columns, out_bytes, groups)


def contiguous_variants(alignment: int, out_bytes: int) -> tuple[AnyGroupedVariant, ...]:
    """Every form that could serve the contiguous layout: what a sweep compares."""
    if alignment < GROUP_ROWS:
        return tuple(grouped_small_variant(w, alignment, out_bytes) for w in WEIGHT_TILES)
    return tuple(grouped_variant(*tile, out_bytes) for tile in WIDE_TILES)


def masked_variants(groups: int, out_bytes: int) -> tuple[AnyGroupedVariant, ...]:
    """Every form that could serve the masked layout."""
    few = [
        grouped_small_variant(weights, tokens, out_bytes, groups)
        for weights in WEIGHT_TILES
        for tokens in TOKEN_TILES
    ]
    return (*few, *(grouped_variant(*tile, out_bytes, groups) for tile in WIDE_TILES))


def programs(
    variant: AnyGroupedVariant, slots: int, slot_rows: int, n: int, processors: int
) -> int:
    """Programs of a launch: no more than there can be items."""
    if isinstance(variant, GroupedVariant):
        most = slots * ceil(slot_rows / variant.rows) * ceil(n / variant.columns)
        return min(processors, most)
    most = slots * ceil(slot_rows / variant.tokens) * ceil(n / variant.weights)
    return min(variant.beside * processors, most)
