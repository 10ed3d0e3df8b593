"""Which form of ``gemm.cu`` serves (M, N, K): a pure function, an analytic model in clocks.

As ``kernels.gluon.choice``, it compares candidates and does not predict microseconds. None of its
constants was measured on this kernel: what they are taken from stands beside them, and
``benchmarks/cuda_sweep.py`` times the candidates, which is what they are to be fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from blockscale.kernels.cuda.work import (
    K_BLOCK,
    MAX_COLUMNS,
    WAVE_ROWS,
    Form,
    Share,
    Work,
    make_form,
    make_work,
)

if TYPE_CHECKING:
    from blockscale.formats import DType

# Tiles worth a form: DeepGEMM's widths (facts/kernels.md 1.2), and no narrow ones in tall tiles.
TILES = {
    64: (32, 64, 96, 128, 192),
    128: (32, 64, 96, 112, 128, 144, 160, 192),
    256: (96, 112, 128),
}
# Tiles of 64 rows are not for more tokens, taller ones not for fewer.
MAX_LOW_M, MIN_HIGH_M = 512, 33
# Two blocks share a multiprocessor where each has at least so many slots.
LEAST_STAGES = 4
# How little of the second slowest bound shows (estimate).
SHARPNESS = 8
# The model is trusted this far.
FAR = 1.3


@dataclass(frozen=True, slots=True)
class Costs:
    """In clocks, and bytes a clock.

    ``start``: from the launch to the first wave. ``l2_of_one``, ``l2_of_all``: L2 to one and to all
    multiprocessors. ``wave``: from a wave's end to the next one's start, beside its FFMAs.
    ``latency``: from a slot's release to its next copy's arrival. ``write``: rounding and staging
    one wave, beside its bytes. ``cluster``: what a launch of clusters takes longer.
    """

    start: float = 2015.0  # as fitted for Gluon's dense kernel (G16)
    l2_of_one: float = 63.8  # as above
    l2_of_all: float = 6683.0  # as above
    memory: float = 2999.0  # as above
    wave: float = 90.0  # estimate: Gluon's 144 less its two barriers
    latency: float = 2000.0  # G12: 128x128 with 3 slots takes 986 a block, 256x128 with 2 2023
    write: float = 450.0  # estimate: Gluon's 672 less its barriers of 128 threads
    cluster: float = 300.0  # estimate


COSTS = Costs()


@lru_cache(maxsize=8192)
def choose(m: int, n: int, k: int, out: DType, processors: int) -> Work:
    """What serves ``m`` tokens of an (n, k) weight. Needs m, n, k >= 1.

    ``processors``: the device's multiprocessors.
    """
    return min(candidates(m, n, k, out, processors), key=lambda work: clocks(work, m, n))


def candidates(m: int, n: int, k: int, out: DType, processors: int) -> tuple[Work, ...]:
    """Everything that ``choose`` compares."""
    found = [make_work(form, m, n, k, processors) for form in forms(out) if _is_for(form, m)]
    return tuple(work for work in found if _shares_something(work))


def promising(m: int, n: int, k: int, out: DType, processors: int) -> list[Work]:
    """The candidates that the model does not hold for far slower than its choice, best first."""
    found = sorted(candidates(m, n, k, out, processors), key=lambda work: clocks(work, m, n))
    limit = FAR * clocks(found[0], m, n)
    return [work for work in found if clocks(work, m, n) <= limit]


@lru_cache(maxsize=8)
def forms(out: DType) -> tuple[Form, ...]:
    """Every form that ``choose`` can ask for, whatever the shape."""
    found = []
    for rows, widths in TILES.items():
        for columns in widths:
            if columns > MAX_COLUMNS[rows]:
                continue
            found += [make_form(rows, columns, out, share=share) for share in Share]
            if rows == WAVE_ROWS:
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
    return work.units > 1 and (work.unit_columns if form.share is Share.ACTIVATION
                               else work.unit_rows) > 1  # fmt: skip


def clocks(work: Work, m: int, n: int) -> float:
    """The model's time of one launch."""
    form = work.form
    k = work.k_blocks * K_BLOCK
    out_bytes = form.out.bytes
    from_memory = (n * k + m * k + m * n * out_bytes) / COSTS.memory
    rounds = ceil(work.units * form.cluster / work.blocks)
    write = form.waves * (COSTS.write + form.columns * out_bytes)
    fill = COSTS.latency / 2
    busy = rounds * (work.k_blocks * _block_clocks(work) + write) + fill
    return COSTS.start + (form.cluster - 1) * COSTS.cluster + max(from_memory, busy)


def _block_clocks(work: Work) -> float:
    """One K block of one tile: the slowest of tensor cores, a consumer's chain, L2 and latency.

    Those near the slowest count too: they do not overlap perfectly.
    """
    form = work.form
    beside = form.beside
    # 64 x n x 128 takes 2 n clocks of the tensor cores; 64 x n FFMAs over 128 threads n / 2 more.
    tensor = beside * form.consumers * form.waves * 2 * form.columns
    chain = form.waves * (2.5 * form.columns + COSTS.wave)
    arriving = (form.rows + form.columns) * K_BLOCK
    halves = {Share.NOTHING: 0, Share.ACTIVATION: form.rows, Share.WEIGHT: form.columns}
    asked = arriving - halves[form.share] * K_BLOCK / 2
    l2 = max(beside * arriving / COSTS.l2_of_one, work.blocks * asked / COSTS.l2_of_all)
    bounds = (tensor, chain, l2, (COSTS.latency + chain) / form.stages)
    return sum(bound**SHARPNESS for bound in bounds) ** (1 / SHARPNESS)
