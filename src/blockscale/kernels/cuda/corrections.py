"""What measurements say beyond the model: its error by form, and the fastest form of known shapes.

``tables/cuda.json``, written by ``benchmarks/cuda_fit.py`` from the sweep that it names, is a table
as ``kernels.corrected`` describes. A work has two of its forms: a tile, by whom it is written, and
what is shared. Groups' results are written in boxes only; their tiles are judged by what the same
program made of a sweep when all were (``tables/in_boxes.json``).
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, log2
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import Table, bounded, table_of, work_named
from blockscale.kernels.cuda.costs import estimate, lines, outside_share, rounds, row_tiles
from blockscale.kernels.cuda.writing import written

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.kernels.cuda.work import Work


SHARED = ("alone", "shared activation", "shared weight")


@lru_cache(maxsize=1)
def shipped() -> Table:
    """The table that ships."""
    return table_of("blockscale.kernels.cuda", "cuda")


@lru_cache(maxsize=1)
def shipped_in_boxes() -> Table:
    """That of tiles which TMA writes."""
    return table_of("blockscale.kernels.cuda", "in_boxes")


def clocks(work: Work, m: int, n: int, processors: int) -> float:
    """The corrected time of one launch, written as ``writing.written`` says."""
    return _clocks(work, m, n, processors, shipped(), forms_of(work))


def clocks_in_boxes(work: Work, m: int, n: int, processors: int) -> float:
    """The same where TMA writes the results."""
    forms = tile(work), SHARED[work.form.share]
    return _clocks(work, m, n, processors, shipped_in_boxes(), forms)


def _clocks(
    work: Work, m: int, n: int, processors: int, table: Table, forms: tuple[str, ...]
) -> float:
    found = estimate(work, m, n)
    own = bounded(quantities(work, m, found.memory / found.clocks, processors), table.ranges)
    return found.clocks * exp(table.error(forms, terms(own)))


def quantities(work: Work, m: int, memory_share: float, processors: int) -> tuple[float, ...]:
    """What the model's error may depend on; most are logarithms, so that halves and doubles count.

    In order: blocks that run together, K blocks, the share of memory in the time, the share of rows
    beyond M, M, tiles of rows, rounds, the last round's empty places, blocks on one multiprocessor,
    whether rows lie across lines of L2.
    """
    turns = rounds(work)
    return (
        log2(work.blocks / processors),
        log2(work.k_blocks),
        memory_share,
        outside_share(work, m),
        log2(m),
        log2(row_tiles(work, m)),
        log2(turns),
        min(1.0, turns * work.blocks / (work.units * work.form.cluster) - 1),
        log2(work.crowd),
        float(lines(work.k) - 1),
    )


def terms(own: tuple[float, ...]) -> tuple[float, ...]:
    """What factors belong to: one, the quantities, and the products of some.

    The last four are newer than ``tables/in_boxes.json``, which has no factors of them.
    """
    *first, across = own
    together, blocks, memory, outside, _m, _rows, turns = own[:7]
    return (
        1.0,
        *first,
        blocks * blocks,
        memory * memory,
        together * blocks,
        together * memory,
        blocks * memory,
        outside * memory,
        blocks * turns,
        across,
        across * blocks,
        across * memory,
    )


def forms_of(work: Work) -> tuple[str, ...]:
    """Tile, with ``x2`` where two blocks share a multiprocessor; who writes it; what is shared."""
    by = " by lanes" if written(work).form.stores.buffers == 0 else ""
    return tile(work) + by, SHARED[work.form.share]


def tile(work: Work) -> str:
    """``64x32x2``: a tile, and how many blocks share a multiprocessor, whatever the dtype."""
    form = work.form
    return f"{form.rows}x{form.columns}" + (f"x{form.beside}" if form.beside > 1 else "")


def winner(
    works: Iterable[Work], m: int, shape: tuple[int, int], out_bytes: int, processors: int
) -> Work | None:
    """Which of ``works`` was measured to be the fastest; None where nothing was measured."""
    return work_named(shipped().winner(m, shape, out_bytes, processors), works, winner_name)


def winner_name(work: Work) -> str:
    """``128x192+a``: how a winner is written."""
    return tile(work) + ("", "+a", "+b")[work.form.share]
