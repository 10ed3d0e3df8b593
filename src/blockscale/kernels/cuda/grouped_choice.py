"""Which grouped form of ``gemm.cu`` serves some rows: pure functions of what the host knows.

Which rows belong to which group lies on the GPU; the host knows how many groups there are, how many
row blocks there are at most, and of slots how many rows are likely to count. Whatever is chosen is
right for any routing, only not as fast. The model is the dense kernel's (``costs``), on the rows
that tiles are likely to compute.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import together
from blockscale.kernels.cuda.costs import MEMORY, MEMORY_POWER, estimate
from blockscale.kernels.cuda.work import (
    HALF_SHARED_BYTES,
    MAX_COLUMNS,
    SCALE_BYTES,
    SHARED_BYTES,
    WAVE_ROWS,
    Grouping,
    Share,
    Stores,
    When,
    Work,
    in_flight,
    late,
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
# The largest tiles, and stores that leave room for a fourth slot at 256x128.
LARGE = ((128, 192), (256, 128))
LOW_BOXES = Stores(128, 3, 8, When.LATE)
# Of a tile's time, what half of its waves take: a consumer's chain binds, not the tensor cores.
LEAST_OF_TILE = 0.6
# Two blocks share a multiprocessor where each has more slots than these.
LEAST_STAGES = 4


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


@lru_cache(maxsize=8)
def contiguous_forms(out: DType) -> tuple[Form, ...]:
    """Every form that could serve: alone, or two blocks that share the activation's rows."""
    return tuple(
        replace(
            in_flight(late(make_form(height, columns, out, share=share))),
            grouping=Grouping.CONTIGUOUS,
        )
        for height, widths in TILES.items()
        for columns in widths
        for share in (Share.NOTHING, Share.ACTIVATION)
        if columns <= MAX_COLUMNS[height]
    )


@lru_cache(maxsize=8192)
def choose_masked(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> Work:
    """What serves the ``rows``: slots, rows of a slot, and how many of them are likely to count."""
    found = masked_works(rows, shape, out, processors)
    return min(found, key=lambda work: masked_clocks(work, rows, shape))


def masked_works(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> list[Work]:
    """Everything that ``choose_masked`` compares: tiles of one wave where one holds the rows."""
    is_low = min(rows[1:]) <= WAVE_ROWS
    forms = [form for form in masked_forms(out) if (form.rows == WAVE_ROWS) == is_low]
    found = [make_masked_work(form, rows[:2], shape, processors) for form in forms]
    return [w for w in found if w.form.share is Share.NOTHING or w.unit_columns > 1]


@lru_cache(maxsize=8)
def masked_forms(out: DType) -> tuple[Form, ...]:
    """Every form that could serve slots."""
    found = [masked_form(form) for form in contiguous_forms(out)]
    beside = [
        in_flight(late(make_form(WAVE_ROWS, columns, out, beside=2)))
        for columns in TILES[WAVE_ROWS]
    ]
    found += [masked_form(form) for form in beside if form.stages > LEAST_STAGES]
    return tuple(found)


def masked_clocks(work: Work, rows: tuple[int, int, int], shape: tuple[int, int]) -> float:
    """The model's time, for slots that all have about the likely rows.

    A slot's last tile takes the time of its waves that hold rows; half a wave more is the mean.
    """
    slots, slot_rows, likely = rows
    likely = max(1, min(likely, slot_rows))
    tall = work.form.rows
    part = 1.0 if tall == WAVE_ROWS else LEAST_OF_TILE
    unit_rows = max(1, round(slots * max(part, (likely + WAVE_ROWS / 2) / tall)))
    most = work.blocks // work.form.cluster
    blocks = min(most, unit_rows * work.unit_columns) * work.form.cluster
    grown = replace(work, unit_rows=unit_rows, blocks=blocks)
    n, k = shape
    # The model counts one weight's bytes; here each slot has its own.
    found = estimate(grown, unit_rows * tall, n)
    return together(MEMORY_POWER, found.clocks, slots * n * k / MEMORY)


def masked_form(form: Form) -> Form:
    """The same for slots: its table of groups may cost a slot of the ring."""
    found = replace(form, grouping=Grouping.MASKED)
    room = SHARED_BYTES if form.beside == 1 else HALF_SHARED_BYTES
    if found.shared_bytes > room:
        found = replace(found, stages=found.stages - 1)
    return found


def make_masked_work(
    form: Form, slots: tuple[int, int], shape: tuple[int, int], processors: int
) -> Work:
    """``slots``: how many, and rows of each; the device finds which of their tiles there are."""
    one = make_work(form, slots[1], *shape, processors)
    unit_rows = slots[0] * one.unit_rows
    clusters = processors * form.beside // form.cluster
    blocks = min(clusters, unit_rows * one.unit_columns) * form.cluster
    return replace(one, unit_rows=unit_rows, blocks=blocks)


def contiguous_clocks(work: Work, rows: tuple[int, int, int], n: int) -> float:
    """The model's time, for row blocks that all belong to a group.

    A tile of two row blocks meets the end of a group in its middle half of the time, and then takes
    two turns, of half its waves each.
    """
    groups, blocks, alignment = rows
    form = work.form
    per_tile = max(1, form.rows // alignment)
    turns = ceil(blocks * alignment / form.rows)
    if per_tile > 1:
        turns += round((min(groups, blocks) - 1) / 2 * (2 * LEAST_OF_TILE - 1))
    grown = replace(work, unit_rows=turns)
    return estimate(grown, turns * form.rows, n).clocks


def compared(works: list[Work]) -> list[Work]:
    """What a sweep times of ``works``: large tiles, in bands of several heights; a deeper ring."""
    large = [work for work in works if (work.form.rows, work.form.columns) in LARGE]
    found = [
        replace(work, band=min(height * work.band, work.unit_rows))
        for work in large
        for height in (1, 2, 4)
    ]
    for work in large:
        form = work.form
        if form.rows > WIDE_BLOCK and form.out.bytes < SCALE_BYTES:
            deeper = replace(form, stages=form.stages + 1, stores=LOW_BOXES)
            found.append(replace(work, form=deeper))
    return found
