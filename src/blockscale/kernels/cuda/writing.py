"""Who writes a tile's results and when: ways to compare, and the one that was fastest.

A warp writes by TMA from buffers in shared memory, box by box, or its lanes write; at the tile's
end, or while the next one's first waves run.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from blockscale.formats import DType
from blockscale.kernels.cuda.work import (
    SCALE_BLOCK,
    WARP_ROWS,
    WAVE_ROWS,
    Stores,
    When,
    fits,
    make_form,
    usual_stores,
    widest_box,
    with_stores,
)

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Form, Work

# Slots of a form that is worth comparing.
LEAST_STAGES = 3
# Of more there are no registers for two waves beside the results.
MOST_COLUMNS_IN_FLIGHT = 128
# K blocks of a short K, and of a very short one: lanes and boxes were compared by them.
SHORT_BLOCKS, TINY_BLOCKS = 16, 4
# Late, tiles of this width take longer where K is long (``cuda_stores.py``, H100, 2026-11-26).
NEVER_LATE_COLUMNS = 160
# Late and with two waves in flight: tiles that a block has, one after the other.
MOST_TURNS_IN_FLIGHT = 4


def late_stores(rows: int, columns: int, out: DType) -> Stores:
    """Late, in the usual boxes, but in wider ones where those would be of 32 bytes a row.

    What was fastest of ``forms_to_compare`` (H100, 2026-11-26, ``cuda_stores.py``).
    """
    usual = usual_stores(rows, columns, out)
    if rows * columns == 256 * 128:
        return Stores(128, 2, when=When.LATE)
    box = widest_box(columns, out)
    if usual.box_bytes >= min(64, box):
        return replace(usual, when=When.LATE)
    if columns > SCALE_BLOCK:
        return Stores(box, 3, WARP_ROWS // 2, When.LATE)
    return Stores(box, 2, when=When.LATE)


def late(form: Form) -> Form:
    """The same tile, written late."""
    return with_stores(form, late_stores(form.rows, form.columns, form.out))


def at_once(form: Form) -> Form:
    """The same tile, written at once; in wide boxes where the usual ones are of 32 bytes a row.

    Through as many buffers as leave room for the most slots: a block's only tile is written once,
    and 128x64 with 8 slots took 6 % less than with 7 (H100, 2026-11-26).
    """
    stores = usual_stores(form.rows, form.columns, form.out)
    box = widest_box(form.columns, form.out)
    if stores.box_bytes < min(64, box):
        stores = Stores(box, 2 if form.columns <= SCALE_BLOCK else 3)
    ways = [replace(stores, buffers=count) for count in range(stores.buffers, 0, -1)]
    return max((with_stores(form, way) for way in ways), key=lambda found: found.stages)


def by_lanes(form: Form, when: When) -> Form:
    """The same tile, written by lanes; not for every N (``work.fits``)."""
    return with_stores(
        form, replace(usual_stores(form.rows, form.columns, form.out), buffers=0, when=when)
    )


def in_flight(form: Form) -> Form:
    """The same with two waves in flight, where there are registers for them.

    At K above 2048 tiles take 5 to 18 % less, at other K 1 to 11 % (H100, 2026-11-26,
    ``cuda_stores.py``).
    """
    if form.waves > 1 or form.columns > MOST_COLUMNS_IN_FLIGHT:
        return form
    return replace(form, flight=2)


def forms_to_compare(rows: int, columns: int, out: DType) -> tuple[Form, ...]:
    """A tile with the ways to write it that are worth comparing, the usual one first.

    Late in the best guess's boxes; at once with buffers for all waves; late with buffers for one or
    for all waves, or in 3 KB a warp. Each also with two waves in flight.
    """
    usual = usual_stores(rows, columns, out)
    box = widest_box(columns, out)
    boxes = ceil(columns * out.bytes / box)
    waves = max(1, rows // (2 * WAVE_ROWS))
    ways = [usual, late_stores(rows, columns, out), Stores(box, waves * boxes)]
    ways += [replace(usual, when=When.LATE)]
    ways += [Stores(box, count, when=When.LATE) for count in (boxes, waves * boxes)]
    ways += [Stores(box, 3, WARP_ROWS // 2, When.LATE)] * (box // out.bytes % 32 == 0)
    found = [make_form(rows, columns, out, stores=stores) for stores in dict.fromkeys(ways)]
    found += [in_flight(form) for form in found]
    return tuple(form for form in dict.fromkeys(found) if form.stages >= LEAST_STAGES)


def written(work: Work) -> Work:
    """The same tiles, written in the way that was fastest: by lanes or in boxes."""
    found = _written_by_lanes(work)
    if found is None or not fits(found, work.n):
        return in_boxes(work)
    return replace(work, form=found)


def ways_to_write(work: Work) -> tuple[Work, ...]:
    """What ``written`` was chosen from: boxes; lanes at once or late, in flight or not."""
    lanes = [replace(by_lanes(work.form, when), flight=1) for when in When]
    lanes += [in_flight(form) for form in lanes]
    fitting = [replace(work, form=form) for form in lanes if fits(form, work.n)]
    return tuple(dict.fromkeys([in_boxes(work), *fitting]))


def in_boxes(work: Work) -> Work:
    """The same tiles, written by TMA as was fastest (``cuda_stores.py``, H100, 2026-11-26).

    Late where blocks have several tiles. A block's only tile gains nothing by it, and the longer
    code takes 3-6 % of a short launch. Nor do low tiles whose K blocks all fit into the ring: their
    first slot comes back late.
    """
    form = work.form
    if in_flight(form).flight > 1:
        return replace(work, form=_written_in_flight(form, work.turns))
    is_long = work.k_blocks > form.stages or form.rows > 2 * WAVE_ROWS
    if work.turns > 1 and is_long and form.columns != NEVER_LATE_COLUMNS:
        return replace(work, form=late(form))
    return replace(work, form=at_once(form))


def _written_by_lanes(work: Work) -> Form | None:
    """None where boxes took less.

    Each way of a tile that took less in the mean over real models' shapes, by turns and K
    (``cuda_sweep.py --ways``, printed by ``cuda_ways.py``; H100, 2026-11-27, perf-log G46).
    """
    form, turns = work.form, work.turns
    rows, columns = form.rows, form.columns
    is_wide, is_only, are_few = form.out is DType.FLOAT32, turns <= 1, turns <= MOST_TURNS_IN_FLIGHT
    is_short, is_tiny = work.k_blocks <= SHORT_BLOCKS, work.k_blocks <= TINY_BLOCKS
    if rows == WAVE_ROWS:
        return in_flight(by_lanes(form, When.AT_ONCE)) if columns <= SCALE_BLOCK else None
    takes_it = {
        (128, 32): True,
        (128, 64): is_short,
        (128, 96): is_short or is_only,
        (128, 128): is_wide or not is_short or are_few,
        (128, 144): True,
        (128, 160): is_wide or not is_tiny,
        (128, 192): is_wide or is_short or is_only,
        (256, 128): is_wide or is_short or are_few,
    }
    if not takes_it.get((rows, columns), False):
        return None
    # Of other tiles a wave at a time took less.
    is_in_flight = columns == SCALE_BLOCK and rows == 2 * WAVE_ROWS
    return in_flight(by_lanes(form, When.AT_ONCE)) if is_in_flight else by_lanes(form, When.LATE)


def _written_in_flight(form: Form, turns: float) -> Form:
    """Small tiles and a block's only tile at once; others late, of many turns a wave at a time.

    After many turns the two consumers of a block have come apart, so that each promotes while the
    other's wave runs: from 4 turns on 128x128 takes 1 to 8 % more with two waves in flight.
    """
    if turns <= 1 or form.rows == WAVE_ROWS or form.columns <= WAVE_ROWS:
        return in_flight(at_once(form))
    return in_flight(late(form)) if turns <= MOST_TURNS_IN_FLIGHT else late(form)
