"""What a sweep says beyond an analytic model of a launch: its error, and what was fastest.

A table, written by a program beside the sweep (``benchmarks/choice_fit.py``), has

- for each form of a kernel, the logarithm of measured / modelled time as a linear function of
  quantities that the kernel's own module names;
- for each (N, K) of the sweep, by bucket of M, what was fastest.

Kernels with such a table: ``gluon.corrections``, ``cuda.corrections``. Needs neither torch nor
Triton. A table is read once, at the first choice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import ceil
from operator import mul
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Work = TypeVar("Work")

# A correction is never more than this, as a logarithm, if its table says nothing else. All errors
# of a shape may be large together: with 0.5 most were cut off at M above 1024, and the choice among
# them lost 3.5 %, not 1.0 % (gemm.cu, H200's sweeps of 2026-11-26).
MOST = 1.5
# Of a result's element, as sweeps are measured.
OUT_BYTES = 2
# One work serves all M of a bucket: a tile of tokens up to 64, then 16 rows, which is how the sweep
# steps. Between more distant M the fastest work is not the same (docs/perf-log.md G17).
FEW_TOKENS = (8, 16, 32, 64)
BUCKET_ROWS = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """``clocks`` of one launch by a model, and what memory alone would take."""

    clocks: float
    memory: float


@dataclass(frozen=True, slots=True)
class Table:
    """``ranges``: least and greatest of each quantity in the sweep; beyond, it is taken for them.

    ``winners``: a work's name by (n, k) and bucket of M, on a GPU of ``processors``. ``most``: no
    correction is more, as a logarithm.
    """

    processors: int
    ranges: tuple[tuple[float, float], ...]
    factors: dict[str, tuple[float, ...]]
    winners: dict[tuple[int, int], dict[int, str]]
    most: float = MOST

    def error(self, forms: Iterable[str], own: tuple[float, ...]) -> float:
        """log(measured / modelled) of a work with the ``terms`` ``own``; its forms' errors add."""
        found = sum(sum(map(mul, self.factors.get(form, ()), own)) for form in forms)
        return max(-self.most, min(self.most, found))

    def winner(self, m: int, shape: tuple[int, int], out_bytes: int, processors: int) -> str | None:
        """What was fastest for ``m`` tokens of an (n, k) weight; None where it was not measured."""
        if out_bytes != OUT_BYTES or processors != self.processors:
            return None
        return self.winners.get(shape, {}).get(bucket(m))


@lru_cache(maxsize=4)
def table_of(package: str, name: str) -> Table:
    """The table of this name that ships with a package of kernels."""
    document = json.loads(
        (resources.files(package) / "tables" / f"{name}.json").read_text(encoding="utf-8")
    )
    return Table(
        document["processors"],
        tuple((low, high) for low, high in document["ranges"]),
        {form: tuple(factors) for form, factors in document["factors"].items()},
        {
            (n, k): {int(bucket): name for bucket, name in map(_parts, words.split())}
            for n, k, words in document["winners"]
        },
        document.get("most", MOST),
    )


def work_named(
    name: str | None, works: Iterable[Work], name_of: Callable[[Work], str]
) -> Work | None:
    """The one of ``works`` that a table calls ``name``; None if it has no name for it."""
    if name is None:
        return None
    return next((work for work in works if name_of(work) == name), None)


def bounded(values: tuple[float, ...], ranges: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """``values``, those beyond what was measured moved to its ends."""
    pairs = zip(values, ranges, strict=True)
    # Half as fast with min and max, and planning asks thousands of times.
    return tuple([low if value < low else min(value, high) for value, (low, high) in pairs])


def bucket(m: int) -> int:
    """The largest M that the same measured work serves."""
    few = next((tokens for tokens in FEW_TOKENS if m <= tokens), None)
    return few or ceil(m / BUCKET_ROWS) * BUCKET_ROWS


def together(power: float, *limits: float) -> float:
    """A little more than the largest of ``limits``; more where several are near it."""
    return float(sum([limit**power for limit in limits]) ** (1 / power))


def _parts(word: str) -> tuple[str, str]:
    first, _, name = word.partition(":")
    return first, name
