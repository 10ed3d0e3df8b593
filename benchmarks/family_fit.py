"""Fits microseconds to the clocks of both kernel families, and says what choosing by them loses.

    python benchmarks/family_fit.py SWEEP... [--write] [--folds 5]

SWEEP: ``cuda_sweep.py``'s, which times the forms of gemm.cu and what Gluon's choice takes on each
shape. A loss is chosen / faster of the two families, Gluon by its choice of today and gemm.cu by
what its model takes, without the winners, which are of this very sweep; (N, K) are held out
(``--folds`` parts, each left out once). By range of M: what is lost by each family alone, by the
faster estimate at that M, and by the ranges that a plan would make of the estimates
(``planning.timed``), with how many ranges a plan has. ``--write`` writes
``kernels/tables/calibration.json``, fitted to nine (N, K) in ten (the tests judge by the tenth).
Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch

from blockscale.formats import DType
from blockscale.kernels import calibration
from blockscale.kernels.corrected import bounded
from blockscale.kernels.cuda import choice as cuda_choice
from blockscale.kernels.cuda import corrections as cuda_corrections
from blockscale.kernels.gluon import choice as gluon_choice
from blockscale.kernels.gluon import corrections as gluon_corrections
from blockscale.planning.timed import TOKENS, Timed, in_ranges, starts_of
from choice_fit import HELD_OUT, PROCESSORS, ROOT, parts, report
from cuda_fit import time_of

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET = ROOT / "src" / "blockscale" / "kernels" / "tables" / "calibration.json"
FAMILIES = ("gluon", "cuda")
RIDGE = 1.0
DIGITS = 6
OUT = DType.FLOAT16
# Of a result's element.
BYTES = 2

Factors = dict[str, tuple[float, ...]]
Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A family's choice for a shape: the model's ``clocks``, and what else it is judged by."""

    clocks: float
    kinds: tuple[float, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Shape:
    """One (M, N, K) of the sweep; ``us``: measured, by family."""

    m: int
    n: int
    k: int
    us: dict[str, float]


def main() -> int:
    """Read, validate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    shapes = [shape for sweep in options.sweeps for shape in read(sweep)]
    ranges = ranges_of(shapes)
    print(f"{len(shapes)} shapes, {len({(s.n, s.k) for s in shapes})} different (N, K)")
    validate(shapes, ranges, options.folds)
    if options.write:
        kept = parts(shapes, HELD_OUT)
        factors = fit([shape for shape in shapes if kept[shape.n, shape.k]], ranges)
        write(options.sweeps, shapes, ranges, factors)
    return 0


def read(sweep: Path) -> list[Shape]:
    """Shapes on which the choice of both families was timed."""
    found = []
    for line in map(json.loads, sweep.read_text(encoding="utf-8").splitlines()):
        if "times" not in line:
            continue
        m, n, k = line["m"], line["n"], line["k"]
        gluon = f"gluon {chosen('gluon', m, n, k).name}"
        form = cuda_choice.modelled(m, n, k, OUT, PROCESSORS)
        us = {"gluon": line["times"].get(gluon), "cuda": time_of(form, line["times"])}
        if None not in us.values():
            found.append(Shape(m, n, k, us))
    return found


@lru_cache(maxsize=65536)
def chosen(family: str, m: int, n: int, k: int) -> Product:
    """What a family takes for a shape."""
    if family == "gluon":
        work = gluon_choice.choose(m, n, k, BYTES, PROCESSORS)
        clocks = gluon_corrections.clocks(work, m, n, BYTES, PROCESSORS)
        return Product(clocks, calibration.gluon_kinds(work), work.name)
    form = cuda_choice.modelled(m, n, k, OUT, PROCESSORS)
    clocks = cuda_corrections.clocks(form, m, n, PROCESSORS)
    return Product(clocks, calibration.cuda_kinds(form), form.name)


def ranges_of(shapes: Sequence[Shape]) -> Ranges:
    """Least and greatest of the sizes."""
    columns = zip(*(calibration.sizes(s.m, s.n, s.k) for s in shapes), strict=True)
    return tuple((round(min(c), DIGITS), round(max(c), DIGITS)) for c in map(list, columns))


def terms(family: str, shape: tuple[int, int, int], ranges: Ranges) -> tuple[float, ...]:
    """What factors belong to."""
    own = bounded(calibration.sizes(*shape), ranges)
    return calibration.terms(own, chosen(family, *shape).kinds)


def fit(shapes: Sequence[Shape], ranges: Ranges) -> Factors:
    """Ridge regressions of log(microseconds / clocks), columns scaled to deviations of one."""
    found = {}
    for family in FAMILIES:
        rows = [terms(family, (s.m, s.n, s.k), ranges) for s in shapes]
        design = torch.tensor(rows, dtype=torch.float64)
        error = torch.tensor(
            [math.log(s.us[family] / chosen(family, s.m, s.n, s.k).clocks) for s in shapes],
            dtype=torch.float64,
        )
        centre, spread = design.mean(0), design.std(0).clamp_min(1e-9)
        scaled = (design - centre) / spread
        scaled[:, 0] = 0.0
        gram = scaled.T @ scaled + RIDGE * torch.eye(scaled.shape[1], dtype=torch.float64)
        factors = torch.linalg.solve(gram, scaled.T @ (error - error.mean())) / spread
        factors[0] = error.mean() - (factors[1:] * centre[1:]).sum()
        found[family] = tuple(round(value, DIGITS) for value in factors.tolist())
    return found


def estimated(family: str, shape: tuple[int, int, int], ranges: Ranges, factors: Factors) -> float:
    """Microseconds."""
    error = sum(map(mul, factors[family], terms(family, shape, ranges)))
    return chosen(family, *shape).clocks * math.exp(error)


def validate(shapes: Sequence[Shape], ranges: Ranges, folds: int) -> None:
    """Losses on (N, K) that were left out of the fit."""
    fold = parts(shapes, folds)
    losses: dict[str, list[tuple[int, float]]] = {}
    counts = []
    for number in range(folds):
        factors = fit([s for s in shapes if fold[s.n, s.k] != number], ranges)
        for n, k in sorted(pair for pair, of in fold.items() if of == number):
            plan = plan_of(n, k, ranges, factors)
            counts.append(len(plan))
            for shape in (s for s in shapes if (s.n, s.k) == (n, k)):
                best = min(shape.us.values())
                own = (shape.m, n, k)
                times = {name: estimated(name, own, ranges, factors) for name in FAMILIES}
                by_m = min(times, key=times.__getitem__)
                planned = [family for start, family in plan if start <= shape.m][-1]
                taken = {"gluon alone": "gluon", "cuda alone": "cuda"}
                taken |= {"the faster estimate": by_m, "a plan's ranges": planned}
                for words, family in taken.items():
                    lost = math.log(shape.us[family] / best)
                    losses.setdefault(words, []).append((shape.m, lost))
    for words, found in losses.items():
        print(f"{words}, (N, K) held out")
        report(found)
    print(f"ranges of a plan: mean {mean(counts):.1f}, most {max(counts)}")


def plan_of(n: int, k: int, ranges: Ranges, factors: Factors) -> list[tuple[int, str]]:
    """The ranges that a plan makes of the estimates: (first M, family)."""
    times = [
        {family: estimated(family, (m, n, k), ranges, factors) for family in FAMILIES}
        for m in TOKENS
    ]
    points = [
        Timed(start, m, one) for start, m, one in zip(starts_of(TOKENS), TOKENS, times, strict=True)
    ]
    return [(0, "gluon"), *((one.min_m, one.backend) for one in in_ranges(points, FAMILIES))]


def write(
    sweeps: Sequence[Path], shapes: Sequence[Shape], ranges: Ranges, factors: Factors
) -> None:
    """The table that ships, with where it comes from."""
    head = json.loads(sweeps[0].read_text(encoding="utf-8").splitlines()[0])
    paths = [str(sweep.resolve().relative_to(ROOT)) for sweep in sweeps]
    log = ["git", "log", "-1", "--format=%h %cs", "--", *paths]
    said = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - git
    commit, _, date = said.stdout.strip().partition(" ")
    kept = parts(shapes, HELD_OUT)
    document = {
        "schema": 1,
        "device": head["machine"],
        "packages": head["versions"],
        "commit": commit,
        "date": date,
        "sources": paths,
        "held_out": sorted(pair for pair, part in kept.items() if not part),
        "least_m": min(shape.m for shape in shapes),
        "ranges": ranges,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in factors.items()]
    text = "{\n" + ",\n".join(lines) + ',\n "factors": {\n' + ",\n".join(rows) + "\n }\n}\n"
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
