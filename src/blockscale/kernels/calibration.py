"""Microseconds of whole products, by kernel family: comparable between families.

A family's model compares its own candidates (``gluon.corrections``, ``cuda.corrections``); its
clocks are not another family's. ``tables/calibration.json``, written from a sweep that times both
families on each shape (``benchmarks/family_fit.py``), has for each the logarithm of microseconds /
clocks as a quadratic function of the logarithms of M, N and K, and of the kind of work. float32
results have factors of their own, of another sweep: compare families, not dtypes. Needs neither
torch nor Triton.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import exp, log2
from operator import mul
from typing import TYPE_CHECKING

from blockscale.formats import DType
from blockscale.kernels.corrected import bounded
from blockscale.kernels.cuda import choice as cuda_choice
from blockscale.kernels.cuda import corrections as cuda_corrections
from blockscale.kernels.cuda.costs import lines, rounds
from blockscale.kernels.cuda.work import K_BLOCK
from blockscale.kernels.gluon import choice as gluon_choice
from blockscale.kernels.gluon import corrections as gluon_corrections
from blockscale.kernels.gluon.work import SmallWork

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.kernels.cuda.work import Work as CudaWork
    from blockscale.kernels.gluon.work import Work as GluonWork


@dataclass(frozen=True, slots=True)
class Calibration:
    """``least_m``: that was timed. ``ranges``: of ``sizes``; beyond, they are taken for them."""

    least_m: int
    ranges: tuple[tuple[float, float], ...]
    factors: dict[str, tuple[float, ...]]


def shipped(out: DType) -> Calibration:
    """The table that ships for results of this type."""
    return _tables()["float32" if out is DType.FLOAT32 else "16 bits"]


def gluon_us(m: int, n: int, k: int, out: DType, processors: int) -> float | None:
    """What Gluon's choice for ``m`` tokens of an (n, k) weight takes; None below what was timed."""
    if m < shipped(out).least_m:
        return None
    work = gluon_choice.choose(m, n, k, out.bytes, processors)
    clocks = gluon_corrections.clocks(work, m, n, out.bytes, processors)
    return clocks * _us_per_clock("gluon", (m, n, k), gluon_kinds(work), shipped(out))


def cuda_us(m: int, n: int, k: int, out: DType, processors: int) -> float | None:
    """As ``gluon_us``, of what the model of ``gemm.cu`` takes.

    Where the table of winners knows better, the product is a little faster than this says.
    """
    if m < shipped(out).least_m:
        return None
    work = cuda_choice.modelled(m, n, k, out, processors)
    clocks = cuda_corrections.clocks(work, m, n, processors)
    return clocks * _us_per_clock("cuda", (m, n, k), cuda_kinds(work), shipped(out))


def gluon_kinds(work: GluonWork) -> tuple[float, ...]:
    """Whether it is the small-M kernel, splits sums, has narrow tiles, has tiles of two parts."""
    if isinstance(work, SmallWork):
        return (1.0, float(work.pieces > 1), 0.0, 0.0)
    return (0.0, float(work.pieces > 1), float(work.narrow_tiles > 0), float(work.variant.rest > 0))


def cuda_kinds(work: CudaWork) -> tuple[float, ...]:
    """Whether two blocks share a multiprocessor, or those of a cluster an operand; rounds.

    Rounds as logarithms, also times that of K blocks: the corrections of the clocks have this
    product, which is nothing where there is one round.
    """
    turns = log2(rounds(work))
    kinds = float(work.form.beside > 1), float(work.form.cluster > 1)
    return (*kinds, turns, turns * log2(work.k_blocks))


def sizes(m: int, n: int, k: int) -> tuple[float, float, float, float]:
    """What the error depends on: logarithms of M, N and K blocks; 1 where rows lie across lines."""
    return log2(m), log2(n), log2(max(1.0, k / K_BLOCK)), float(lines(k) - 1)


def terms(own: Iterable[float], kinds: Iterable[float]) -> tuple[float, ...]:
    """One, the sizes, the logarithms' squares and products, and the kinds."""
    m, n, k, across = own
    return (1.0, m, n, k, m * m, n * n, k * k, m * n, m * k, n * k, across, *kinds)


def _us_per_clock(
    family: str, shape: tuple[int, int, int], kinds: tuple[float, ...], table: Calibration
) -> float:
    own = bounded(sizes(*shape), table.ranges)
    return exp(sum(map(mul, table.factors[family], terms(own, kinds))))


@lru_cache(maxsize=1)
def _tables() -> dict[str, Calibration]:
    place = resources.files("blockscale.kernels") / "tables" / "calibration.json"
    document = json.loads(place.read_text(encoding="utf-8"))
    return {
        name: Calibration(
            document[name]["least_m"],
            tuple((low, high) for low, high in document[name]["ranges"]),
            {family: tuple(row) for family, row in document[name]["factors"].items()},
        )
        for name in ("16 bits", "float32")
    }
