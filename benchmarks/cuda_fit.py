"""Fits the corrections of ``gemm.cu``'s model: ``choice_fit.py`` says how.

    python benchmarks/cuda_fit.py SWEEP... [--write] [--folds 5]

The sweeps are ``cuda_sweep.py``'s.
"""

from __future__ import annotations

import sys

from blockscale.formats import DType
from blockscale.kernels.cuda import corrections
from blockscale.kernels.cuda.choice import candidates
from blockscale.kernels.cuda.costs import estimate
from choice_fit import PROCESSORS, TABLES, Family, fit_family

CUDA = Family(
    TABLES / "cuda" / "tables" / "cuda.json",
    candidates=lambda m, n, k: candidates(m, n, k, DType.FLOAT16, PROCESSORS),
    estimate=estimate,
    quantities=lambda work, m, share: corrections.quantities(work, m, share, PROCESSORS),
    terms=corrections.terms,
    forms=corrections.forms_of,
    winner_name=corrections.winner_name,
    is_new=lambda _work: False,
)

if __name__ == "__main__":
    sys.exit(fit_family(CUDA, __doc__))
