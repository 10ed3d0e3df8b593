"""Which grouped form of ``gemm.cu`` serves some rows: a pure function of what the host knows.

Which rows belong to which group lies on the GPU; the host knows how many row blocks there are at
most, and how many groups. Whatever is chosen is right for any routing, only not as fast. The model
is the dense kernel's (``costs``), on the rows that tiles are likely to compute.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from blockscale.kernels.cuda.costs import estimate
from blockscale.kernels.cuda.work import (
    MAX_COLUMNS,
    Grouping,
    Share,
    Work,
    make_form,
    make_work,
)

if TYPE_CHECKING:
    from blockscale.formats import DType
    from blockscale.kernels.cuda.work import Form

# Rows of a row block. Fewer would leave most of a wave's 64 rows empty.
ALIGNMENTS = (64, 128)
# Tiles by the rows that they have: those that the dense sweep found fastest from M of 1024 on.
TILES = {64: (64, 96, 128, 192), 128: (96, 112, 128, 144, 160, 192), 256: (112, 128)}
# A tile of two row blocks is for row blocks of this many rows.
WIDE_BLOCK = 128
# The model is trusted this far.
FAR = 1.2


@lru_cache(maxsize=8192)
def choose_contiguous(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> Work:
    """What serves the ``rows``: groups, row blocks at most, rows of a row block (64 or 128).

    ``shape``: (n, k) of a group's weight; ``processors``: the device's multiprocessors.
    """
    found = contiguous_works(rows, shape, out, processors)
    return min(found, key=lambda work: contiguous_clocks(work, rows, shape[0]))


def contiguous_works(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> list[Work]:
    """Everything that ``choose_contiguous`` compares."""
    _, blocks, alignment = rows
    found = []
    for form in contiguous_forms(out):
        if form.rows > alignment and alignment < WIDE_BLOCK:
            continue
        work = make_work(form, blocks * alignment, *shape, processors)
        if form.share is Share.NOTHING or work.unit_columns > 1:
            found.append(work)
    return found


def promising_contiguous(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> list[Work]:
    """What the model does not hold for far slower than its choice, best first: for a sweep."""
    found = {
        work: contiguous_clocks(work, rows, shape[0])
        for work in contiguous_works(rows, shape, out, processors)
    }
    least = min(found.values())
    return [work for work in sorted(found, key=found.__getitem__) if found[work] <= FAR * least]


@lru_cache(maxsize=8)
def contiguous_forms(out: DType) -> tuple[Form, ...]:
    """Every form that could serve: alone, or two blocks that share the activation's rows."""
    return tuple(
        replace(make_form(height, columns, out, share=share), grouping=Grouping.CONTIGUOUS)
        for height, widths in TILES.items()
        for columns in widths
        for share in (Share.NOTHING, Share.ACTIVATION)
        if columns <= MAX_COLUMNS[height]
    )


def contiguous_clocks(work: Work, rows: tuple[int, int, int], n: int) -> float:
    """The model's time, for row blocks that all belong to a group.

    A tile of two row blocks meets the end of a group in its middle half of the time, and then takes
    two turns.
    """
    groups, blocks, alignment = rows
    form = work.form
    per_tile = max(1, form.rows // alignment)
    turns = ceil(blocks * alignment / form.rows)
    if per_tile > 1:
        turns += (min(groups, blocks) - 1) // 2
    grown = replace(work, unit_rows=turns)
    return estimate(grown, turns * form.rows, n).clocks
