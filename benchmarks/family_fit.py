"""Fits microseconds to the clocks of both kernel families, and says what choosing by them loses.

    python benchmarks/family_fit.py SWEEP... [--write] [--folds 5] [--float32 FILE...]
                                    [--judge FILE...]

SWEEP: ``cuda_sweep.py``'s, which times the forms of gemm.cu and what Gluon's choice takes on each
shape. A loss is chosen / faster of the two families, Gluon by its choice of today and gemm.cu by
what its model takes, without the winners, which are of this very sweep; (N, K) are held out
(``--folds`` parts, each left out once). By range of M: what is lost by each family alone, by the
faster estimate at that M, and by the ranges that a plan would make of the estimates
(``planning.timed``), with how many ranges a plan has.

Then the same of float32 results, each (N, K) left out once, of both fits. The models know how many
bytes a result has; FILE, a sweep or ``gemm.py``'s records of the choices of today, says by which
factor each family takes longer than that on the average. What is lost without it comes first. At
last, what is lost by the table as it is written on the float32 shapes of ``--judge``, another GPU's
sweep, none of which it was fitted to.

``--write`` writes ``kernels/tables/calibration.json``, fitted to nine (N, K) in ten (the tests
judge by the tenth) and to all of FILE. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
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
from blockscale.planning.timed import TOKENS, Timed, in_ranges, starts_of
from choice_fit import HELD_OUT, PROCESSORS, ROOT, parts, report
from cuda_fit import time_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TARGET = ROOT / "src" / "blockscale" / "kernels" / "tables" / "calibration.json"
FAMILIES = ("gluon", "cuda")
RIDGE = 1.0
DIGITS = 6
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
FLOAT32 = (RESULTS / "gemm.jsonl",)
JUDGES = (RESULTS.parent / "nvidia-h200" / "cuda_sweep-float32.jsonl",)

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
    """What the table has; ``float32``: for results of that type, on top, as a logarithm."""

    ranges: Ranges
    factors: Factors
    float32: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 0.0))


def main() -> int:
    """Read, validate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--float32", type=Path, nargs="+", default=FLOAT32)
    parser.add_argument("--judge", type=Path, nargs="*", default=JUDGES)
    options = parser.parse_args()
    shapes = [one for sweep in options.sweeps for one in read(sweep, DType.FLOAT16)]
    float32 = [one for path in options.float32 for one in read(path, DType.FLOAT32)]
    ranges = ranges_of(shapes)
    print(f"{len(shapes)} shapes, {len({(s.n, s.k) for s in shapes})} different (N, K)")
    print("(N, K) held out")
    validate(
        shapes, parts(shapes, options.folds), lambda kept: fit([*filter(kept, shapes)], ranges)
    )
    validate_float32(float32, shapes, ranges)
    kept = parts(shapes, HELD_OUT)
    fitted = fit([shape for shape in shapes if kept[shape.n, shape.k]], ranges)
    fitted = with_float32(fitted, float32)
    for path in options.judge:
        judge(path, fitted)
    if options.write:
        write(options.sweeps, options.float32, shapes, fitted)
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


def ranges_of(shapes: Sequence[Shape]) -> Ranges:
    """Least and greatest of the sizes."""
    columns = zip(*(calibration.sizes(s.m, s.n, s.k) for s in shapes), strict=True)
    return tuple((round(min(c), DIGITS), round(max(c), DIGITS)) for c in map(list, columns))


def fit(shapes: Sequence[Shape], ranges: Ranges) -> Fitted:
    """Ridge regressions of log(microseconds / clocks), columns scaled to deviations of one."""
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
    return Fitted(ranges, found)


def terms(shape: Shape, product: Product, ranges: Ranges) -> tuple[float, ...]:
    """What factors belong to."""
    own = bounded(calibration.sizes(shape.m, shape.n, shape.k), ranges)
    return calibration.terms(own, product.kinds)


def with_float32(fitted: Fitted, shapes: Sequence[Shape]) -> Fitted:
    """With the mean of log(microseconds / estimate) of these shapes, all of float32 results."""
    return replace(
        fitted,
        float32={
            family: round(
                mean(math.log(s.us[family] / estimated(family, s, fitted)) for s in shapes), DIGITS
            )
            for family in FAMILIES
        },
    )


def estimated(family: str, shape: Shape, fitted: Fitted) -> float:
    """Microseconds."""
    product = chosen(family, shape.m, shape.n, shape.k, shape.out)
    error = sum(map(mul, fitted.factors[family], terms(shape, product, fitted.ranges)))
    if shape.out is DType.FLOAT32:
        error += fitted.float32[family]
    return product.clocks * math.exp(error)


def validate_float32(float32: Sequence[Shape], shapes: Sequence[Shape], ranges: Ranges) -> None:
    """Losses of float32 results without what was measured of them, and with."""
    pairs = sorted({(s.n, s.k) for s in float32})
    print(f"\nfloat32: {len(float32)} shapes, {len(pairs)} different (N, K), each held out")
    each = {pair: number for number, pair in enumerate(pairs)}
    print("float32, by the models of 16-bit results")
    validate(float32, each, lambda kept: fit([*filter(kept, shapes)], ranges))
    print("float32, with a factor for each family")
    validate(
        float32,
        each,
        lambda kept: with_float32(fit([*filter(kept, shapes)], ranges), [*filter(kept, float32)]),
    )


def judge(path: Path, fitted: Fitted) -> None:
    """Losses of float32 results on all shapes of a sweep."""
    shapes = read(path, DType.FLOAT32)
    pairs = {(s.n, s.k): 0 for s in shapes}
    print(
        f"\nfloat32, {path.name} of {path.parent.name}: {len(shapes)} shapes, {len(pairs)} (N, K)"
    )
    print("by the models of 16-bit results")
    validate(shapes, pairs, lambda _kept: Fitted(fitted.ranges, fitted.factors))
    print("as the table is written")
    validate(shapes, pairs, lambda _kept: fitted)


def validate(
    shapes: Sequence[Shape],
    fold: Mapping[tuple[int, int], int],
    fitted_to: Callable[[Callable[[Shape], bool]], Fitted],
) -> None:
    """Losses on (N, K) that were left out of the fit, one part after the other."""
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    counts = []
    for number in sorted(set(fold.values())):
        fitted = fitted_to(lambda s, number=number: fold.get((s.n, s.k)) != number)  # type: ignore[misc]
        for n, k in sorted(pair for pair, of in fold.items() if of == number):
            plan = plan_of(n, k, shapes[0].out, fitted)
            counts.append(len(plan))
            for shape in (s for s in shapes if (s.n, s.k) == (n, k)):
                best = min(shape.us.values())
                times = {name: estimated(name, shape, fitted) for name in FAMILIES}
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
    print(f"ranges of a plan: mean {mean(counts):.1f}, most {max(counts)}")


def plan_of(n: int, k: int, out: DType, fitted: Fitted) -> list[tuple[int, str]]:
    """The ranges that a plan makes of the estimates: (first M, family)."""
    times = [
        {family: estimated(family, Shape(m, n, k, {}, out), fitted) for family in FAMILIES}
        for m in TOKENS
    ]
    points = [
        Timed(start, m, one) for start, m, one in zip(starts_of(TOKENS), TOKENS, times, strict=True)
    ]
    return [(0, "gluon"), *((one.min_m, one.backend) for one in in_ranges(points, FAMILIES))]


def write(
    sweeps: Sequence[Path], float32: Sequence[Path], shapes: Sequence[Shape], fitted: Fitted
) -> None:
    """The table that ships, with where it comes from."""
    head = json.loads(sweeps[0].read_text(encoding="utf-8").splitlines()[0])
    paths, own = ([str(path.resolve().relative_to(ROOT)) for path in x] for x in (sweeps, float32))
    log = ["git", "log", "-1", "--format=%h %cs", "--", *paths, *own]
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
        "float32_sources": own,
        "held_out": sorted(pair for pair, part in kept.items() if not part),
        "least_m": min(shape.m for shape in shapes),
        "ranges": fitted.ranges,
        "float32": fitted.float32,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in fitted.factors.items()]
    text = "{\n" + ",\n".join(lines) + ',\n "factors": {\n' + ",\n".join(rows) + "\n }\n}\n"
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
