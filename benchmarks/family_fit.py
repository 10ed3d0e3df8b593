"""Fits microseconds to the clocks of both kernel families, and says what choosing by them loses.

    python benchmarks/family_fit.py SWEEP... [--write] [--folds 5] [--doubt 0.05]
                                    [--float32 FILE...]

SWEEP: ``cuda_sweep.py``'s, which times the forms of gemm.cu and what Gluon's choice takes on each
shape. A loss is chosen / faster of the two families, Gluon by its choice of today and gemm.cu by
what its model takes, without the winners, which are of this very sweep; (N, K) are held out
(``--folds`` parts, each left out once). By range of M: what is lost by each family alone, by the
faster estimate at that M, and by the ranges that a plan would make of the estimates
(``planning.timed``), with how many ranges a plan has.

Then the same of float32 results, by FILE, float32 sweeps or ``gemm.py``'s records of the choices of
today: by what was fitted to 16-bit results (the models know how many bytes a result has), and by
factors fitted to all FILEs.

``--write`` writes ``kernels/tables/calibration.json``, fitted to nine (N, K) in ten (the tests
judge by the tenth). Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from blockscale.kernels import calibration
from blockscale.kernels.corrected import bounded
from blockscale.kernels.cuda import choice as cuda_choice
from blockscale.kernels.cuda import corrections as cuda_corrections
from blockscale.kernels.gluon import choice as gluon_choice
from blockscale.kernels.gluon import corrections as gluon_corrections
from blockscale.planning.estimated import DENSE_DOUBT
from blockscale.planning.timed import TOKENS, Timed, in_ranges, starts_of
from choice_fit import HELD_OUT, PROCESSORS, parts, report, swept_on
from cuda_fit import time_of
from record import ROOT, last_change

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TARGET = ROOT / "src" / "blockscale" / "kernels" / "tables" / "calibration.json"
# In the planner's order of preference.
FAMILIES = ("cuda", "gluon")
RIDGE = 1.0
DIGITS = 6
RESULTS = ROOT / "benchmarks" / "results"
FLOAT32 = tuple(sorted(RESULTS.glob("*/cuda_sweep-float32.jsonl")))

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
    out: DType = DType.FLOAT16


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the table has, of results of one size. ``least_m``, ``ranges``: of what was timed."""

    least_m: int
    ranges: Ranges
    factors: Factors


def main() -> int:
    """Read, validate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--doubt", type=float, default=DENSE_DOUBT, help="of plans' estimates")
    parser.add_argument("--float32", type=Path, nargs="+", default=FLOAT32)
    options = parser.parse_args()
    shapes = [one for sweep in options.sweeps for one in read(sweep, DType.FLOAT16)]
    print(f"{len(shapes)} shapes, {len({(s.n, s.k) for s in shapes})} different (N, K), held out")
    validate(shapes, parts(shapes, options.folds), shapes, options.doubt)
    float32 = {path: read(path, DType.FLOAT32) for path in options.float32}
    every = [shape for found in float32.values() for shape in found]
    fold = parts(every, options.folds)
    for path, found in float32.items():
        print(f"\nfloat32, {path.parent.name}, {path.name}: {len(found)} shapes, (N, K) held out")
        print("fitted to 16-bit results")
        validate(found, fold, shapes, options.doubt)
        print("fitted to float32 results")
        validate(found, fold, every, options.doubt)
    if options.write:
        write(options.sweeps, options.float32, shapes, every)
    return 0


def read(path: Path, out: DType) -> list[Shape]:
    """Shapes on which the choice of both families was timed for results of this type."""
    lines = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    found = []
    for (m, n, k), times in (*swept(lines, out), *recorded(lines, out)):
        gluon = f"gluon {chosen('gluon', m, n, k, out).name}"
        form = cuda_choice.modelled(m, n, k, out, PROCESSORS)
        us = {"gluon": times.get(gluon), "cuda": time_of(form, times)}
        if None not in us.values():
            found.append(Shape(m, n, k, us, out))
    return found


def swept(
    lines: Sequence[dict[str, Any]], out: DType
) -> Iterator[tuple[tuple[int, int, int], Mapping[str, float]]]:
    """What a sweep times, by work; the first ones do not say that they are of float16."""
    for line in lines:
        if "times" in line and line.get("out_dtype", "float16") == out.value:
            yield (line["m"], line["n"], line["k"]), line["times"]


def recorded(
    lines: Sequence[dict[str, Any]], out: DType
) -> Iterator[tuple[tuple[int, int, int], Mapping[str, float]]]:
    """The same of ``gemm.py``'s records: the middle of all that one work took."""
    found: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for line in lines:
        if line.get("out_dtype") != out.value or line.get("backend") not in FAMILIES:
            continue
        name = f"gluon {line['detail']}" if line["backend"] == "gluon" else line["detail"]
        times = found.setdefault((line["m"], line["n"], line["k"]), defaultdict(list))
        times[name].append(line["time_us"])
    for shape, lists in found.items():
        yield shape, {name: median(us) for name, us in lists.items()}


@lru_cache(maxsize=65536)
def chosen(family: str, m: int, n: int, k: int, out: DType) -> Product:
    """What a family takes for a shape."""
    if family == "gluon":
        work = gluon_choice.choose(m, n, k, out.bytes, PROCESSORS)
        clocks = gluon_corrections.clocks(work, m, n, out.bytes, PROCESSORS)
        return Product(clocks, calibration.gluon_kinds(work), work.name)
    form = cuda_choice.modelled(m, n, k, out, PROCESSORS)
    clocks = cuda_corrections.clocks(form, m, n, PROCESSORS)
    return Product(clocks, calibration.cuda_kinds(form), form.name)


def fit(shapes: Sequence[Shape]) -> Fitted:
    """Ridge regressions of log(microseconds / clocks), columns scaled to deviations of one."""
    columns = zip(*(calibration.sizes(s.m, s.n, s.k) for s in shapes), strict=True)
    ranges = tuple((round(min(c), DIGITS), round(max(c), DIGITS)) for c in map(list, columns))
    found = {}
    for family in FAMILIES:
        taken = [chosen(family, s.m, s.n, s.k, s.out) for s in shapes]
        rows = [terms(s, one, ranges) for s, one in zip(shapes, taken, strict=True)]
        design = torch.tensor(rows, dtype=torch.float64)
        error = torch.tensor(
            [math.log(s.us[family] / one.clocks) for s, one in zip(shapes, taken, strict=True)],
            dtype=torch.float64,
        )
        centre, spread = design.mean(0), design.std(0).clamp_min(1e-9)
        scaled = (design - centre) / spread
        scaled[:, 0] = 0.0
        gram = scaled.T @ scaled + RIDGE * torch.eye(scaled.shape[1], dtype=torch.float64)
        factors = torch.linalg.solve(gram, scaled.T @ (error - error.mean())) / spread
        factors[0] = error.mean() - (factors[1:] * centre[1:]).sum()
        found[family] = tuple(round(value, DIGITS) for value in factors.tolist())
    return Fitted(min(shape.m for shape in shapes), ranges, found)


def terms(shape: Shape, product: Product, ranges: Ranges) -> tuple[float, ...]:
    """What factors belong to."""
    own = bounded(calibration.sizes(shape.m, shape.n, shape.k), ranges)
    return calibration.terms(own, product.kinds)


def estimated(family: str, shape: Shape, fitted: Fitted) -> float:
    """Microseconds."""
    product = chosen(family, shape.m, shape.n, shape.k, shape.out)
    error = sum(map(mul, fitted.factors[family], terms(shape, product, fitted.ranges)))
    return product.clocks * math.exp(error)


def validate(
    shapes: Sequence[Shape],
    fold: Mapping[tuple[int, int], int],
    known: Sequence[Shape],
    doubt: float,
) -> None:
    """Losses on ``shapes``, fitted to those of ``known`` whose (N, K) is not in the same part."""
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    counts, errors = [], []
    by_pair: dict[tuple[int, int], list[Shape]] = defaultdict(list)
    for shape in shapes:
        by_pair[shape.n, shape.k].append(shape)
    for number in sorted(set(fold.values())):
        fitted = fit([s for s in known if fold.get((s.n, s.k)) != number])
        for n, k in sorted(pair for pair, of in fold.items() if of == number):
            if (n, k) not in by_pair:
                continue
            plan = plan_of(n, k, shapes[0].out, fitted, doubt)
            counts.append(len(plan))
            for shape in by_pair[n, k]:
                best = min(shape.us.values())
                times = {name: estimated(name, shape, fitted) for name in FAMILIES}
                one, other = FAMILIES
                ratio = times[one] * shape.us[other] / (times[other] * shape.us[one])
                errors.append(math.log(ratio))
                by_m = min(times, key=times.__getitem__)
                planned = [family for start, family in plan if start <= shape.m][-1]
                taken = {"gluon alone": "gluon", "cuda alone": "cuda"}
                taken |= {"the faster estimate": by_m, "a plan's ranges": planned}
                for words, family in taken.items():
                    losses[words].append((shape.m, math.log(shape.us[family] / best)))
    for words, found in losses.items():
        lost = 100 * math.expm1(mean(value for _, value in found))
        print(f"{words}: {lost:.2f} %")
        report(found)
    spread = math.sqrt(mean(error * error for error in errors))
    print(f"ratio of both estimates: off by {100 * spread:.1f} %, root of the mean square")
    print(f"ranges of a plan: mean {mean(counts):.1f}, most {max(counts)}")


def plan_of(n: int, k: int, out: DType, fitted: Fitted, doubt: float) -> list[tuple[int, str]]:
    """The ranges that a plan makes of the estimates: (first M, family)."""
    times = [
        {family: estimated(family, Shape(m, n, k, {}, out), fitted) for family in FAMILIES}
        for m in TOKENS
    ]
    points = [
        Timed(start, m, one, estimated=frozenset(FAMILIES), doubt=doubt)
        for start, m, one in zip(starts_of(TOKENS), TOKENS, times, strict=True)
    ]
    return [(one.min_m, one.backend) for one in in_ranges(points, FAMILIES)]


def write(
    sweeps: Sequence[Path], others: Sequence[Path], shapes: list[Shape], float32: list[Shape]
) -> None:
    """The table that ships, with where it comes from."""
    machines, packages = swept_on(sweeps)
    paths, own = ([str(path.resolve().relative_to(ROOT)) for path in x] for x in (sweeps, others))
    commit, date = last_change([*paths, *own])
    kept = parts(shapes, HELD_OUT)
    document = {
        "schema": 1,
        "device": machines,
        "packages": packages,
        "commit": commit,
        "date": date,
        "sources": paths,
        "float32_sources": own,
        "held_out": sorted(pair for pair, part in kept.items() if not part),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    for name, known in ("16 bits", shapes), ("float32", float32):
        fitted = fit([shape for shape in known if kept.get((shape.n, shape.k), True)])
        rows = [
            f"   {json.dumps(family)}: {json.dumps(row)}" for family, row in fitted.factors.items()
        ]
        lines.append(
            f' {json.dumps(name)}: {{\n  "least_m": {fitted.least_m},\n'
            f'  "ranges": {json.dumps(fitted.ranges)},\n'
            '  "factors": {\n' + ",\n".join(rows) + "\n  }\n }"
        )
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
