"""Fits the corrections of ``gemm.cu``'s model: ``choice_fit.py`` says how.

    python benchmarks/cuda_fit.py SWEEP... [--write] [--folds 5]

The sweeps are ``cuda_sweep.py``'s.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from blockscale.formats import DType
from blockscale.kernels.cuda import corrections
from blockscale.kernels.cuda.choice import candidates
from blockscale.kernels.cuda.costs import estimate
from choice_fit import PROCESSORS, TABLES, Family, fit_family

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Work

TILE = re.compile(r"(\d+x\d+)s\d+(\+[ab])?b\d+(?:r\d+)?x\d+(x\d+)?(?:-late)?(?:w2)? /\d+")


def time_of(work: Work, times: dict[str, float]) -> float | None:
    """Of this very form, else of the same tile however it was written, as older sweeps have it."""
    if work.name in times:
        return times[work.name]
    wanted = corrections.winner_name(work)
    return min((us for name, us in times.items() if tile_of(name) == wanted), default=None)


def tile_of(name: str) -> str | None:
    """A swept form as winners are called."""
    found = TILE.fullmatch(name)
    return found and f"{found[1]}{found[3] or ''}{found[2] or ''}"


CUDA = Family(
    TABLES / "cuda" / "tables" / "cuda.json",
    candidates=lambda m, n, k: candidates(m, n, k, DType.FLOAT16, PROCESSORS),
    estimate=estimate,
    quantities=lambda work, m, share: corrections.quantities(work, m, share, PROCESSORS),
    terms=corrections.terms,
    forms=corrections.forms_of,
    winner_name=corrections.winner_name,
    time_of=time_of,
    is_new=lambda _work: False,
)

if __name__ == "__main__":
    sys.exit(fit_family(CUDA, __doc__))
