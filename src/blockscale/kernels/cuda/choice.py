"""Which form of ``gemm.cu`` serves (M, N, K): a pure function.

As for Gluon (``kernels.gluon.choice``): candidates are compared by ``costs``, an analytic model,
corrected by what a sweep measured (``corrections``); an (N, K) that was in the sweep takes what was
fastest there; what is chosen is written in the way that suits it (``writing.written``, after the
sweep). ``benchmarks/cuda_sweep.py`` times the candidates, ``benchmarks/cuda_fit.py`` makes
the table. Needs neither torch nor a compiler.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from blockscale.kernels.cuda.corrections import clocks, winner
from blockscale.kernels.cuda.work import (
    MAX_COLUMNS,
    WAVE_ROWS,
    Form,
    Share,
    Work,
    make_form,
    make_work,
)
from blockscale.kernels.cuda.writing import written

if TYPE_CHECKING:
    from blockscale.formats import DType

# Tiles that were the fastest of some shape by more than 1 % (H100, 2026-11-26, ``cuda_sweep.py``).
TILES = {
    64: (16, 32, 48, 64, 96, 128, 192),
    128: (32, 64, 96, 128, 144, 160, 192),
    256: (96, 112, 128),
}
# Lanes write tiles of 144 columns (``writing``). Of halves of 72 weight rows, which two blocks
# would copy for each other, a lane would have 4 or 8 bytes that lie together.
POOR_HALVES = 144, Share.WEIGHT
# Tiles of 64 rows are not for more tokens, taller ones not for fewer.
MAX_LOW_M, MIN_HIGH_M = 512, 33
# Two blocks share a multiprocessor where each has at least so many slots.
LEAST_STAGES = 4


@lru_cache(maxsize=8192)
def choose(m: int, n: int, k: int, out: DType, processors: int) -> Work:
    """What serves ``m`` tokens of an (n, k) weight. Needs m, n, k >= 1.

    ``processors``: the device's multiprocessors.
    """
    found = candidates(m, n, k, out, processors)
    known = winner(found, m, (n, k), out.bytes, processors)
    return written(known or modelled(m, n, k, out, processors))


@lru_cache(maxsize=8192)
def modelled(m: int, n: int, k: int, out: DType, processors: int) -> Work:
    """What the corrected model holds for the fastest, whatever was measured for this (N, K)."""
    found = candidates(m, n, k, out, processors)
    return min(found, key=lambda work: clocks(work, m, n, processors))


def candidates(m: int, n: int, k: int, out: DType, processors: int) -> tuple[Work, ...]:
    """Everything that ``choose`` compares."""
    found = [make_work(form, m, n, k, processors) for form in forms(out) if _is_for(form, m)]
    return tuple(work for work in found if _shares_something(work))


@lru_cache(maxsize=8)
def forms(out: DType) -> tuple[Form, ...]:
    """Every form that ``choose`` compares, whatever the shape."""
    found = []
    for rows, widths in TILES.items():
        for columns in widths:
            if columns > MAX_COLUMNS[rows]:
                continue
            if rows > WAVE_ROWS:
                shares = [share for share in Share if (columns, share) != POOR_HALVES]
                found += [make_form(rows, columns, out, share=share) for share in shares]
                continue
            # Few rows: a cluster never was the fastest, two blocks beside each other often.
            found.append(make_form(rows, columns, out))
            beside = make_form(rows, columns, out, beside=2)
            found += [beside] * (beside.stages >= LEAST_STAGES)
    return tuple(found)


def _is_for(form: Form, m: int) -> bool:
    return m <= MAX_LOW_M if form.rows == WAVE_ROWS else m >= MIN_HIGH_M


def _shares_something(work: Work) -> bool:
    """Not a cluster whose second tile lies outside for every unit, nor one block alone."""
    form = work.form
    if form.share is Share.NOTHING:
        return True
    beside = work.unit_columns if form.share is Share.ACTIVATION else work.unit_rows
    return work.units > 1 and beside > 1 and work.blocks > 1
