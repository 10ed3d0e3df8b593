"""Which grouped form of ``gemm.cu`` serves some rows: pure functions of what the host knows.

Which rows belong to which group lies on the GPU; the host knows how many groups there are, how many
row blocks there are at most, and of slots how many rows are likely to count. Whatever is chosen is
right for any routing, only not as fast. The model is the dense kernel's, corrected by its sweep
(``corrections``) where groups have more than one wave of rows, on the tiles that they are likely to
need.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from blockscale.kernels.corrected import together
from blockscale.kernels.cuda import corrections
from blockscale.kernels.cuda.costs import BLOCK_POWER, MEMORY, MEMORY_POWER, estimate
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
    make_form,
    make_work,
    unit_height,
)
from blockscale.kernels.cuda.writing import MOST_TURNS_IN_FLIGHT, in_flight, late

if TYPE_CHECKING:
    from blockscale.formats import DType
    from blockscale.kernels.cuda.work import Form

# Rows of a row block. Fewer would leave most of a wave's 64 rows empty.
ALIGNMENTS = (64, 128)
# Tiles by the rows that they have: those that the dense sweep found fastest from M of 1024 on, and
# of whose error it has a factor.
TILES = {64: (64, 96, 128, 192), 128: (96, 128, 144, 160, 192), 256: (112, 128)}
# A tile of two row blocks is for row blocks of this many rows.
WIDE_BLOCK = 128
# The largest tiles, and stores that leave room for a fourth slot at 256x128.
LARGE = ((128, 192), (256, 128))
LOW_BOXES = Stores(128, 3, 8, When.LATE)
# A group's rows, as parts of the likely count: DeepGEMM's tests draw from 0.7 to 1.3.
COUNTS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
# Bytes a clock of weights that are read once (2.96 TB/s at 1755 MHz; H100, 2026-11-26), and how
# often they are read where a group has several tiles of rows: 128x192 took 2.9 TB/s so.
STREAM, READ_AGAIN = 1690.0, 1.7
# Up to this many tiles of rows a group, its weight is streamed rather than kept in L2: a fourth
# slot then gains 2 to 4 %, and loses 1 to 5 % at four tiles (H100, 2026-11-26).
STREAMED_TILES = 1.5
# What the model misses of tiles of two waves where a slot has several: 256x128 took 2 to 7 % more
# than 128x192 in all of four cases (H100, ``grouped-variants.jsonl``; H200, 2026-11-26).
TALL_TILES = 1.04
# Row blocks of a group, the mean, and K, from which on pairs share its weight.
BLOCKS_OF_PAIRS, K_OF_PAIRS = (1.25, 3.0), 3072
# Bands of units (``grouped_band``).
MOST_IN_BAND = 3
# Two blocks share a multiprocessor where each has more slots than these.
LEAST_STAGES = 4


@lru_cache(maxsize=8192)
def choose_contiguous(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> Work:
    """What serves the ``rows``: groups, row blocks at most, rows of a row block (64 or 128).

    ``shape``: (n, k) of a group's weight; ``processors``: the device's multiprocessors.
    """
    works = contiguous_works(rows, shape, out, processors)
    is_shared = shares_weights(rows, shape[1])
    # All of them where no pair can run: one row block has none beside it.
    found = [work for work in works if (work.form.share is Share.WEIGHT) == is_shared] or works
    pairs = [work for work in found if is_deep_pair(work) and is_several(work)]
    if pairs:
        found = [work for work in found if not can_be_deeper(work.form) or work in pairs]
    return min(found, key=lambda work: contiguous_clocks(work, rows, shape[0], processors))


def shares_weights(rows: tuple[int, int, int], k: int) -> bool:
    """Whether two tiles of rows should share the columns of a group's weight.

    Where about two row blocks of a group read it, and K is long. 128x192 then took 1 to 8 % less in
    pairs than alone (4 of 4 cases with 1.3 to 2.5 row blocks a group at K of 3072 and more, 256 and
    128 experts); up to 2 % more with one row block a group or none to share, 5 to 9 % more at K of
    1536 and 2048, and with many row blocks a group 256x128 took less (H100, 2026-11-26, perf-log
    G34).
    """
    groups, blocks, _ = rows
    least, most = BLOCKS_OF_PAIRS
    return k >= K_OF_PAIRS and least <= blocks / groups <= most


def is_deep_pair(work: Work) -> bool:
    """Whether it is the largest tile in pairs with a fourth slot.

    Where blocks have several tiles it took less than that tile with three slots, alone or in pairs,
    and with four alone, in all of eight cases: 0 to 7 %, each timed as a variant
    (``grouped.py --variants``, H100, 2026-11-26). The dense sweep has no such stores.
    """
    form = work.form
    return can_be_deeper(form) and form.stores == LOW_BOXES and form.share is Share.ACTIVATION


def is_several(work: Work) -> bool:
    """Whether blocks have several tiles each."""
    return work.turns > 1


def contiguous_works(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> list[Work]:
    """Everything that ``choose_contiguous`` compares."""
    groups, blocks, alignment = rows
    found = []
    for form in contiguous_forms(out):
        if form.rows > alignment and alignment < WIDE_BLOCK:
            continue
        work = in_turns(make_work(form, blocks * alignment, *shape, processors))
        work = grouped_band(work, work.unit_rows / groups)
        if can_run(work, blocks * alignment):
            found.append(work)
    return found


def can_run(work: Work, rows: int) -> bool:
    """Whether a cluster has two tiles and two multiprocessors; ``rows``: all, or a slot's."""
    if work.form.share is Share.NOTHING:
        return True
    is_pair = rows > work.form.rows if work.form.share is Share.WEIGHT else work.unit_columns > 1
    return is_pair and work.blocks > 0


@lru_cache(maxsize=8)
def contiguous_forms(out: DType) -> tuple[Form, ...]:
    """Every form that could serve: alone, or two blocks that share rows of an operand.

    Those of the weight where a tile is one row block: then a pair meets two groups at most.
    """
    found = [
        replace(
            in_flight(late(make_form(height, columns, out, share=share))),
            grouping=Grouping.CONTIGUOUS,
        )
        for height, widths in TILES.items()
        for columns in widths
        for share in Share
        if columns <= MAX_COLUMNS[height] and (share is not Share.WEIGHT or height == WIDE_BLOCK)
    ]
    return tuple(found + [deeper(form) for form in found if can_be_deeper(form)])


def can_be_deeper(form: Form) -> bool:
    """Whether there is room for a fourth slot of the largest tile."""
    is_largest = (form.rows, form.columns) == LARGE[-1]
    return is_largest and form.out.bytes < SCALE_BYTES


def deeper(form: Form) -> Form:
    """The same with one more slot, its results in lower boxes."""
    return replace(form, stages=form.stages + 1, stores=LOW_BOXES)


@lru_cache(maxsize=8192)
def choose_masked(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> Work:
    """What serves the ``rows``: slots, rows of a slot, and how many of them are likely to count."""
    works = masked_works(rows, shape, out, processors)
    # In slots pairs that share a weight took 2 % less to 3 % more than the same tile alone (H100).
    found = [work for work in works if work.form.share is not Share.WEIGHT]
    if min(rows[1:]) <= WAVE_ROWS:
        return min(found, key=lambda work: low_clocks(work, rows, shape))
    return min(found, key=lambda work: masked_clocks(work, rows, shape, processors))


def masked_works(
    rows: tuple[int, int, int], shape: tuple[int, int], out: DType, processors: int
) -> list[Work]:
    """Everything that ``choose_masked`` compares: tiles of one wave where one holds the rows.

    The largest tile with its usual ring or a deeper one, by how its weights are read.
    """
    is_low = min(rows[1:]) <= WAVE_ROWS
    is_streamed = likely_tiles(LARGE[-1][0], rows) <= STREAMED_TILES
    forms = [
        form
        for form in masked_forms(out)
        if (form.rows == WAVE_ROWS) == is_low
        and (not can_be_deeper(form) or (form.stores == LOW_BOXES) == is_streamed)
    ]
    found = []
    for form in forms:
        tiles = likely_tiles(unit_height(form), rows)
        work = make_masked_work(form, rows[:2], shape, processors)
        work = grouped_band(in_turns(work, max(1, round(rows[0] * tiles))), tiles)
        if can_run(work, rows[1]):
            found.append(work)
    return found


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


def likely_tiles(height: int, rows: tuple[int, int, int]) -> float:
    """Tiles of ``height`` that a slot is likely to need, the mean; ``rows`` as elsewhere."""
    _, slot_rows, likely = rows
    counts = [max(1, min(slot_rows, part * likely)) for part in COUNTS]
    return sum([ceil(count / height) for count in counts]) / len(counts)


def masked_clocks(
    work: Work, rows: tuple[int, int, int], shape: tuple[int, int], processors: int
) -> float:
    """The model's time where slots have more than a wave of rows.

    A tile takes its time however few rows it has: blocks meet tiles of the same place in each
    slot, and the busiest decides.
    """
    n, k = shape
    tall = unit_height(work.form)
    tiles = likely_tiles(tall, rows)
    grown = with_unit_rows(work, max(1, round(rows[0] * tiles)))
    found = corrections.clocks_in_boxes(grown, grown.unit_rows * tall, n, processors)
    if work.form.waves > 1 and tiles > STREAMED_TILES:
        found *= TALL_TILES
    reads = min(READ_AGAIN, 1 + (READ_AGAIN - 1) * (tiles - 1))
    return together(BLOCK_POWER, found, rows[0] * n * k * reads / STREAM)


def low_clocks(work: Work, rows: tuple[int, int, int], shape: tuple[int, int]) -> float:
    """The model's time where slots have at most a wave of rows; half a wave more is the mean."""
    slots, slot_rows, likely = rows
    n, k = shape
    tall = work.form.rows
    likely = max(1, min(likely, slot_rows))
    unit_rows = max(1, round(slots * max(1.0, (likely + WAVE_ROWS / 2) / tall)))
    # The model counts one weight's bytes; here each slot has its own.
    found = estimate(with_unit_rows(work, unit_rows), unit_rows * tall, n)
    return together(MEMORY_POWER, found.clocks, slots * n * k / MEMORY)


def grouped_band(work: Work, unit_rows: float) -> Work:
    """With units in bands as high as a group's rows of units; ``unit_rows``: how many those are.

    Higher bands read weights of more groups at a time than stay in L2: 128x192 took 2 to 12 % more
    in bands of 14 with one or two row blocks a group, and up to 3 % more with eight; 256x128 up to
    3 % more in bands of 8 with 16 of them (H100, 2026-11-26, perf-log G34).
    """
    high = max(1, min(MOST_IN_BAND, round(unit_rows + 0.25)))
    return replace(work, band=min(work.band, high))


def in_turns(work: Work, unit_rows: int | None = None) -> Work:
    """With one wave in flight where blocks have many large tiles, as the dense kernel.

    ``unit_rows``: rows of units that there are likely to be, if fewer than the work's.
    """
    form = work.form
    if form.flight == 1 or form.rows == WAVE_ROWS:
        return work
    units = (unit_rows or work.unit_rows) * work.unit_columns
    if units * form.cluster <= MOST_TURNS_IN_FLIGHT * work.blocks:
        return work
    return replace(work, form=replace(form, flight=1))


def with_unit_rows(work: Work, unit_rows: int) -> Work:
    """The same launch, were there so many rows of units in all slots together."""
    most = work.blocks // work.form.cluster
    blocks = min(most, unit_rows * work.unit_columns) * work.form.cluster
    return replace(work, unit_rows=unit_rows, blocks=blocks)


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


def contiguous_clocks(work: Work, rows: tuple[int, int, int], n: int, processors: int) -> float:
    """The model's time, for row blocks that all belong to a group.

    A tile of two row blocks meets the end of a group in its middle half of the time, and then takes
    two turns.
    """
    groups, blocks, alignment = rows
    form = work.form
    tall = unit_height(form)
    turns = ceil(blocks * alignment / tall)
    if form.rows > alignment:
        turns += round((min(groups, blocks) - 1) / 2)
    grown = replace(work, unit_rows=turns)
    return corrections.clocks_in_boxes(grown, turns * tall, n, processors)


def compared(works: list[Work]) -> list[Work]:
    """What a sweep times of ``works``: large tiles, in bands of several heights."""
    large = [work for work in works if (work.form.rows, work.form.columns) in LARGE]
    return [
        replace(work, band=min(height * work.band, work.unit_rows))
        for work in large
        for height in (1, 2, 4)
    ]
