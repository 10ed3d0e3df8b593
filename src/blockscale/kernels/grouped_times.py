"""Microseconds of grouped products, by kernel family: comparable between families, and only so.

A common time (weights once from memory, or all products) and what Gluon takes of ``gemm.cu``'s
beside it. From ``benchmarks/grouped.py`` on an H100 (2026-11-26), 16-bit results, row blocks of
128: with 128 rows a group on average Gluon takes 3 to 6 % less (K of 1536 and 3072); with 4096 and
more it takes 1 to 5 % more at K of 7168, 3 to 5 % less at 2048, and 1 % more or 2 % less at 3072.
Between them nothing was measured, nor was ``gemm.cu`` with lower row blocks; in slots of few rows
Gluon takes up to 9 % less. Needs neither torch nor Triton.
"""

from __future__ import annotations

from math import exp, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockscale.formats import DType

# Rows that a token becomes: as many experts (``ALIGNMENTS`` of the backends supposes the same).
TOP = 8
# Bytes of weights and multiply-adds, a microsecond.
STREAM, PRODUCTS = 2.9e6, 0.5e9
OUT_BYTES = 2
# Rows of a group, the mean: up to the first Gluon takes less by ``FEW``, from the second on more by
# ``PER_DOUBLING`` for each doubling of K beyond ``EVEN_K``; as logarithms.
FEW_ROWS, MANY_ROWS = 256, 512
FEW, PER_DOUBLING, EVEN_K = -0.05, 0.04, 4096
# Of K, in the benchmark.
LEAST_K, MOST_K = 1536, 7168


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
    found = cuda_us(tokens, experts, shape, out)
    return None if found is None else found * exp(_behind(tokens * TOP / experts, shape[1]))


def _behind(rows: float, k: int) -> float:
    """log(Gluon's time / that of ``gemm.cu``) for ``rows`` of a group."""
    many = PER_DOUBLING * log2(max(LEAST_K, min(k, MOST_K)) / EVEN_K)
    share = max(0.0, min(1.0, (rows - FEW_ROWS) / (MANY_ROWS - FEW_ROWS)))
    return FEW + share * (many - FEW)
