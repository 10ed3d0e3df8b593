"""Microseconds of grouped products, by who computes them: comparable among these, and only so.

A common time (weights once from memory, or all products), taken for ``gemm.cu``'s, and what Gluon's
kernels and DeepGEMM take beside it, with rows as their offers list them: a level by the rows of a
group, and, where groups have many, so much a doubling of a group's weight.
``tables/grouped_times.json`` has these numbers and says what they are from;
``benchmarks/grouped_times_fit.py`` writes it, and prints how well they do on a GPU and on weights
that they were not fitted to. Levels that nobody measured lie near their neighbours. DeepGEMM's few
rows were timed in slots, which take it less than the rows that it offers. Needs neither torch nor
Triton.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from math import exp, log2
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockscale.formats import DType

# Rows that a token becomes: as many experts (``ALIGNMENTS`` of the backends supposes the same).
TOP = 8
# Bytes of weights and multiply-adds, a microsecond.
STREAM, PRODUCTS = 2.9e6, 0.5e9
OUT_BYTES = 2
# Rows of a group, the mean, that have a level: 1, 16, 128, 1024 and 4096 tokens with 256
# experts, and from where Gluon has tiles of 256 rows (``gluon.grouped_choice``).
ROWS = (1 / 32, 0.5, 4, 32, 128, 512)
# Bytes of a group's weight from which doublings are counted.
EVEN_WEIGHT = 4096 * 4096


@dataclass(frozen=True, slots=True)
class Behind:
    """log(somebody's time / that of ``gemm.cu``).

    ``levels``: at ``ROWS``; ``per_doubling`` of the weight, on top of the last level; ``weights``:
    bytes of the lightest and the heaviest that was fitted, which stand for all beyond.
    """

    levels: tuple[float, ...]
    per_doubling: float
    weights: tuple[int, int]

    def at(self, rows: float, weight: int) -> float:
        """For ``rows`` of a group, the mean, and ``weight`` bytes of each."""
        factors = (*self.levels, self.per_doubling)
        return sum(map(mul, factors, terms(rows, weight, self.weights)))


def cuda_us(tokens: int, experts: int, shape: tuple[int, int], out: DType) -> float | None:
    """What ``gemm.cu`` takes for ``tokens``, each sent to 8 of ``experts`` (n, k) weights.

    None for float32 results, which were not measured.
    """
    if out.bytes != OUT_BYTES:
        return None
    n, k = shape
    rows = tokens * TOP
    return max(min(experts, rows) * n * k / STREAM, rows * n * k / PRODUCTS)


def gluon_us(tokens: int, experts: int, shape: tuple[int, int], out: DType) -> float | None:
    """As ``cuda_us``, of the Gluon kernels."""
    return _beside("gluon", tokens, experts, shape, out)


def deep_gemm_us(tokens: int, experts: int, shape: tuple[int, int], out: DType) -> float | None:
    """As ``cuda_us``, of DeepGEMM."""
    return _beside("deep_gemm", tokens, experts, shape, out)


def _beside(
    family: str, tokens: int, experts: int, shape: tuple[int, int], out: DType
) -> float | None:
    found = cuda_us(tokens, experts, shape, out)
    if found is None:
        return None
    rows, weight = tokens * TOP / experts, shape[0] * shape[1]
    return found * exp(shipped()[family].at(rows, weight))


def terms(rows: float, weight: int, weights: tuple[int, int]) -> tuple[float, ...]:
    """What ``Behind``'s numbers are multiplied by: shares of the levels, doublings of the weight.

    Shares go with the logarithm of ``rows``, between the two levels that these lie between.
    """
    place = _place(rows)
    shares = [max(0.0, 1 - abs(place - index)) for index in range(len(ROWS))]
    low, high = weights
    doublings = log2(max(low, min(weight, high)) / EVEN_WEIGHT)
    return (*shares, shares[-1] * doublings)


def _place(rows: float) -> float:
    """Where ``rows`` lie among ``ROWS``: 1.5 is halfway between the second and the third."""
    for index, (low, high) in enumerate(pairwise(ROWS)):
        if rows < high:
            return index + log2(max(rows, low) / low) / log2(high / low)
    return len(ROWS) - 1.0


@lru_cache(maxsize=1)
def shipped() -> dict[str, Behind]:
    """The table that ships, by family."""
    place = resources.files("blockscale.kernels") / "tables" / "grouped_times.json"
    document = json.loads(place.read_text(encoding="utf-8"))
    low, high = document["weights"]
    return {
        family: Behind(tuple(row[:-1]), row[-1], (low, high))
        for family, row in document["behind"].items()
    }
