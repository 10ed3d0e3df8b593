"""Fits the corrections of the Gluon kernels' model: ``choice_fit.py`` says how.

    python benchmarks/gluon_fit.py SWEEP... [--write] [--folds 5]

The sweeps are ``gluon_sweep.py``'s.
"""

from __future__ import annotations

import sys

from blockscale.kernels.gluon import corrections
from blockscale.kernels.gluon.choice import candidates
from blockscale.kernels.gluon.costs import estimate
from choice_fit import PROCESSORS, TABLES, Family, fit_family

OUT_BYTES = 2
GLUON = Family(
    TABLES / "gluon" / "tables" / "gluon.json",
    candidates=lambda m, n, k, _out: candidates(m, n, k, OUT_BYTES, PROCESSORS),
    estimate=lambda work, m, n: estimate(work, m, n, OUT_BYTES, PROCESSORS),
    quantities=lambda work, m, share: corrections.quantities(work, m, share, PROCESSORS),
    terms=corrections.terms,
    forms=lambda work: (corrections.form(work),),
    winner_name=corrections.winner_name,
    time_of=lambda work, times: times.get(work.name),
    # Tiles of two parts: the first of the H100's sweeps had none.
    is_new=lambda work: getattr(work.variant, "rest", 0) > 0,
)

if __name__ == "__main__":
    sys.exit(fit_family(GLUON, __doc__))
