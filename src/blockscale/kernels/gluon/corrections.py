"""What measurements say beyond the model: its error by tile, and the fastest work of known shapes.

``tables/gluon.json``, written by ``benchmarks/gluon_fit.py`` from the sweep that it names, is a
table as ``kernels.corrected`` describes; its forms are tiles that split or do not.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, exp, log2
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import Table, bounded, table_of, work_named
from blockscale.kernels.gluon.costs import (
    SMALL_PROGRAMS_PER_PROCESSOR,
    estimate,
    outside_share,
)
from blockscale.kernels.gluon.work import SmallWork

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.kernels.gluon.work import Work


@lru_cache(maxsize=1)
def shipped() -> Table:
    """The table that ships."""
    return table_of("blockscale.kernels.gluon", "gluon")


def clocks(work: Work, m: int, n: int, out_bytes: int, processors: int) -> float:
    """The corrected time of one launch."""
    found = estimate(work, m, n, out_bytes, processors)
    table = shipped()
    own = bounded(quantities(work, m, found.memory / found.clocks, processors), table.ranges)
    return found.clocks * exp(table.error((form(work),), terms(own)))


def quantities(work: Work, m: int, memory_share: float, processors: int) -> tuple[float, ...]:
    """What the model's error may depend on; most are logarithms, so that halves and doubles count.

    In order: programs that run together, K blocks of an item, the share of memory in the time, the
    share of rows beyond M, M, pieces, tiles of rows, rounds, the last round's empty places.
    """
    places = SMALL_PROGRAMS_PER_PROCESSOR * processors
    if isinstance(work, SmallWork):
        items, at_once, row_tiles = work.parts * work.pieces, places, work.token_tiles
    else:
        items, at_once, row_tiles = max(1, work.items), work.programs, work.row_tiles
    return (
        log2(min(items, places) / processors),
        log2(work.piece_blocks),
        memory_share,
        outside_share(work, m, processors),
        log2(m),
        log2(work.pieces),
        log2(row_tiles),
        log2(ceil(items / places)),
        min(1.0, ceil(items / at_once) * at_once / items - 1),
    )


def terms(own: tuple[float, ...]) -> tuple[float, ...]:
    """What factors belong to: one, the quantities, and the products of some."""
    together, blocks, memory, outside, _m, pieces = own[:6]
    return (
        1.0,
        *own,
        blocks * blocks,
        memory * memory,
        together * blocks,
        together * memory,
        blocks * memory,
        outside * memory,
        pieces * together,
    )


def form(work: Work) -> str:
    """Tile, and whether sums are split: ``small64x8``, ``128x64+split``, whatever the dtype."""
    return tile(work).removesuffix("+narrow") + "+split" * (work.pieces > 1)


def tile(work: Work) -> str:
    """Tile, and whether a narrow column follows: how winners are named, before their pieces."""
    if isinstance(work, SmallWork):
        return f"small{work.variant.weights}x{work.variant.tokens}"
    return f"{work.variant.rows}x{work.variant.columns}" + "+narrow" * (work.narrow_tiles > 0)


def winner(
    works: Iterable[Work], m: int, shape: tuple[int, int], out_bytes: int, processors: int
) -> Work | None:
    """Which of ``works`` was measured to be the fastest; None where nothing was measured."""
    return work_named(shipped().winner(m, shape, out_bytes, processors), works, winner_name)


def winner_name(work: Work) -> str:
    """``64x32/4``: how a winner is written."""
    return f"{tile(work)}/{work.pieces}"
