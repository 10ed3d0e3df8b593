"""Fits the corrections of ``gemm.cu``'s model: ``choice_fit.py`` says how.

    python benchmarks/cuda_fit.py SWEEP... [--write] [--folds 5]

The sweeps are ``cuda_sweep.py``'s.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blockscale.formats import DType
from blockscale.kernels.cuda import corrections
from blockscale.kernels.cuda.choice import candidates
from blockscale.kernels.cuda.costs import estimate
from blockscale.kernels.cuda.writing import written
from choice_fit import PROCESSORS, TABLES, Family, fit_family

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Work


def time_of(work: Work, times: dict[str, float]) -> float | None:
    """Of this tile in the way in which it is written now, whatever its band was."""
    wanted = written(work).form.name
    found = [us for name, us in times.items() if name.partition(" /")[0] == wanted]
    return min(found, default=None)


CUDA = Family(
    TABLES / "cuda" / "tables" / "cuda.json",
    candidates=lambda m, n, k, out: candidates(m, n, k, DType(out), PROCESSORS),
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
