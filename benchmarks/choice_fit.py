"""Fits the corrections of a kernel's model to a sweep, and says what its choice loses.

What ``gluon_fit.py`` and ``cuda_fit.py`` have in common:

    python benchmarks/gluon_fit.py SWEEP... [--write] [--folds 5]

A loss is chosen / fastest of what was timed. First, by range of M, what is lost on (N, K) that the
fit has not seen (``--folds`` parts by (N, K), each left out once): by the analytic model alone, by
the corrected one, and by the fastest work of the nearest (N, K) at that M. Then what the table of
winners loses where a shape was measured twice (one measurement chooses, the other judges), and at
another M of the same bucket. ``--write`` writes what ships:
factors fitted to nine (N, K) in ten (the tests judge them by the tenth), winners of all.

The fit is a ridge regression of log(measured / modelled), a constant for each shape taken out: what
a whole shape gains or loses from one measurement to the next (4-8 %) chooses nothing. Candidates
near the fastest count most; each shape counts the same. A candidate may belong to several forms,
whose errors add. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from blockscale.kernels.corrected import Table, bounded, bucket
from record import ROOT, last_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from blockscale.kernels.corrected import Estimate

TABLES = ROOT / "src" / "blockscale" / "kernels"
PROCESSORS = 132
RANGES = (
    (1, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 256),
    (257, 512),
    (513, 1024),
    (1025, 16384),
)
RANGES += ((17, 512), (1, 16384))
# Candidates this far from the fastest count 1/e of it; beyond FAR times the fastest, nothing.
NEAR, FAR = 0.1, 1.7
# What was not timed is taken for this much slower than the fastest, unless the model says more.
DOUBT = 1.2
# How strongly factors are held near zero, against the eight observations that a shape counts for.
RIDGE, CONSTANT_RIDGE, OBSERVATIONS = 1.0, 0.1, 8
# Errors beyond this, as a logarithm, count by their size, not by its square.
ROBUST, REPEATS = 0.05, 3
DIGITS = 4
# Winners are of such results; a sweep that does not say of which it is is of these.
WINNERS_OUT = "float16"
# The factors that ship are fitted without one (N, K) in ten: the tests judge them by those.
HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class Family:
    """A kernel and its candidates, of which this program sees names and numbers only.

    ``candidates``: of (m, n, k, the results' dtype). ``estimate``: of (work, m, n).
    ``quantities``: of (work, m, the share of memory). ``forms``: which factors a work has.
    ``time_of``: a work's time among those of a line of the sweep, by name; None if it was not
    timed. ``is_new``: whether a part of the sweep did not have such works yet.
    """

    table: Path
    candidates: Callable[[int, int, int, str], tuple[Any, ...]]
    estimate: Callable[[Any, int, int], Estimate]
    quantities: Callable[[Any, int, float], tuple[float, ...]]
    terms: Callable[[tuple[float, ...]], tuple[float, ...]]
    forms: Callable[[Any], tuple[str, ...]]
    winner_name: Callable[[Any], str]
    time_of: Callable[[Any, dict[str, float]], float | None]
    is_new: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Timed:
    """A candidate of a shape: ``us`` measured, ``clocks`` by the analytic model, its quantities."""

    family: Family
    work: Any
    us: float
    clocks: float
    own: tuple[float, ...]

    @property
    def forms(self) -> tuple[str, ...]:
        """The factors that it has."""
        return self.family.forms(self.work)

    @property
    def winner_name(self) -> str:
        """How a table of winners calls it."""
        return self.family.winner_name(self.work)

    def terms(self, ranges: tuple[tuple[float, float], ...]) -> tuple[float, ...]:
        """What its factors belong to."""
        return self.family.terms(bounded(self.own, ranges))


@dataclass(frozen=True, slots=True)
class Shape:
    """One (M, N, K) of a sweep. ``rest``: candidates that were not timed; ``out``: a dtype."""

    m: int
    n: int
    k: int
    timed: list[Timed]
    rest: list[Timed]
    out: str

    @property
    def best(self) -> float:
        """Microseconds of the fastest."""
        return min(one.us for one in self.timed)


def fit_family(family: Family, words: str | None) -> int:
    """Read, validate, write, as the command line says; ``words``: the program's own."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    shapes = [shape for sweep in options.sweeps for shape in read(family, sweep)]
    print(f"{len(shapes)} shapes, {len({(s.n, s.k) for s in shapes})} different (N, K)")
    validate(shapes, options.folds)
    judge_winners([shape for shape in shapes if shape.out == WINNERS_OUT])
    if options.write:
        kept = parts(shapes, HELD_OUT)
        table = rounded(fit([shape for shape in shapes if kept[shape.n, shape.k]]))
        ours = [shape for shape in shapes if shape.out == WINNERS_OUT]
        table = replace(table, winners=winners(ours, table))
        write(family.table, options.sweeps, table, kept)
    return 0


def read(family: Family, sweep: Path) -> list[Shape]:
    """Shapes with every candidate that ships and its time."""
    found = []
    for line in map(json.loads, sweep.read_text(encoding="utf-8").splitlines()):
        if "times" not in line:
            continue
        m, n, k = line["m"], line["n"], line["k"]
        out = line.get("out_dtype", WINNERS_OUT)
        works = [
            timed_work(family, work, m, n, family.time_of(work, line["times"]) or math.inf)
            for work in family.candidates(m, n, k, out)
        ]
        timed = [one for one in works if one.us < math.inf]
        rest = [one for one in works if one.us == math.inf]
        found.append(Shape(m, n, k, timed, rest, out))
    return found


def timed_work(family: Family, work: Any, m: int, n: int, us: float) -> Timed:  # noqa: ANN401 - of any family
    """With what the model says."""
    model = family.estimate(work, m, n)
    own = family.quantities(work, m, model.memory / model.clocks)
    return Timed(family, work, us, model.clocks, own)


def fit(shapes: list[Shape]) -> Table:
    """Ranges of the quantities and factors of each form.

    Fitted twice: what was not timed, because an older model held it for far slower, and comes out
    near the fastest is then taken for ``DOUBT`` times as slow as the fastest.
    """
    first = fit_to(shapes, shapes)
    return fit_to(shapes, [replace(s, timed=s.timed + doubtful(s, first)) for s in shapes])


def doubtful(shape: Shape, table: Table) -> list[Timed]:
    """Candidates that the sweep did not find worth timing and a fit does.

    Not those that a part of the sweep did not have yet.
    """
    best = min(shape.timed, key=lambda one: one.us)
    least = corrected(table, best) + math.log(DOUBT)
    return [
        replace(one, us=DOUBT * best.us)
        for one in shape.rest
        if not one.family.is_new(one.work) and corrected(table, one) < least
    ]


def fit_to(shapes: list[Shape], observed: list[Shape]) -> Table:
    """One fit; ranges and what is fastest are of ``shapes``."""
    near = [
        (number, one)
        for number, shape in enumerate(observed)
        for one in shape.timed
        if one.us <= FAR * shapes[number].best
    ]
    columns = list(zip(*(one.own for _, one in near), strict=True))
    ranges = tuple((min(column), max(column)) for column in columns)
    forms = sorted({form for _, one in near for form in one.forms})
    rows = torch.tensor([one.terms(ranges) for _, one in near], dtype=torch.float64)
    width = rows.shape[1]
    design = torch.zeros(len(near), len(forms) * width, dtype=torch.float64)
    for row, (_, one) in enumerate(near):
        for form in one.forms:
            start = forms.index(form) * width
            design[row, start : start + width] = rows[row]
    error = torch.tensor([math.log(one.us / one.clocks) for _, one in near], dtype=torch.float64)
    distance = [math.log(one.us / shapes[number].best) / NEAR for number, one in near]
    counts = torch.exp(-torch.tensor(distance, dtype=torch.float64))
    owner = torch.tensor([number for number, _ in near])
    factors = solve(design, error, counts, owner, width).view(len(forms), width)
    by_form = {name: tuple(row) for name, row in zip(forms, factors.tolist(), strict=True)}
    return Table(PROCESSORS, ranges, by_form, {})


def solve(
    design: torch.Tensor, error: torch.Tensor, counts: torch.Tensor, owner: torch.Tensor, width: int
) -> torch.Tensor:
    """Factors by ridge regression, each shape's mean taken out, large errors held down."""
    shapes = int(owner.max()) + 1

    def by_shape(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(shapes, *values.shape[1:], dtype=values.dtype)
        return zeros.index_add_(0, owner, values)

    counts = OBSERVATIONS * counts / by_shape(counts)[owner]
    held = torch.full((width,), RIDGE, dtype=torch.float64)
    held[0] = CONSTANT_RIDGE
    diagonal = torch.diag(held.repeat(design.shape[1] // width))
    weights = counts
    factors = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(REPEATS):
        all_of = by_shape(weights).clamp_min(1e-12)
        weighted = design * weights[:, None]
        sums = by_shape(weighted)
        gram = design.T @ weighted - (sums / all_of[:, None]).T @ sums + diagonal
        centred = error - (by_shape(weights * error) / all_of)[owner]
        factors = torch.linalg.solve(gram, weighted.T @ centred)
        left = error - design @ factors
        left -= (by_shape(weights * left) / all_of)[owner]
        weights = counts / torch.sqrt(1 + (left / ROBUST) ** 2)
    return factors


def winners(shapes: Iterable[Shape], table: Table) -> dict[tuple[int, int], dict[int, str]]:
    """The work that loses least in each bucket, of those that were timed at each of its M.

    None where the corrected model holds something that was not timed for faster than the fastest:
    a part of the H100's sweep had no tiles of 192 columns yet.
    """
    found: dict[tuple[int, int], dict[int, str]] = {}
    groups: dict[tuple[int, int, int], list[Shape]] = defaultdict(list)
    for shape in shapes:
        if is_judged(shape, table):
            groups[shape.n, shape.k, bucket(shape.m)].append(shape)
    for (n, k, of_m), members in sorted(groups.items()):
        times: dict[str, list[float]] = defaultdict(list)
        for shape in members:
            for one in shape.timed:
                times[one.winner_name].append(one.us / shape.best)
        everywhere = {name: mean(t) for name, t in times.items() if len(t) == len(members)}
        if everywhere:
            found.setdefault((n, k), {})[of_m] = min(everywhere, key=everywhere.__getitem__)
    return found


def is_judged(shape: Shape, table: Table) -> bool:
    """Whether nothing that was left out is held for faster than the fastest that was timed."""
    best = min(shape.timed, key=lambda one: one.us)
    least = min((corrected(table, one) for one in shape.rest), default=math.inf)
    return corrected(table, best) <= least


def corrected(table: Table, one: Timed) -> float:
    """The model's logarithm with a table's factors."""
    return math.log(one.clocks) + table.error(one.forms, one.terms(table.ranges))


def clocks_of(one: Timed) -> float:
    """Of the analytic model alone."""
    return one.clocks


def loss(shape: Shape, cost: Callable[[Timed], float]) -> float:
    """log(chosen / fastest)."""
    return math.log(min(shape.timed, key=cost).us / shape.best)


def validate(shapes: list[Shape], folds: int) -> None:
    """Losses on (N, K) that were left out of the fit."""
    fold = parts(shapes, folds)
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number in range(folds):
        seen = [shape for shape in shapes if fold[shape.n, shape.k] != number]
        table = fit(seen)
        for shape in shapes:
            if fold[shape.n, shape.k] != number:
                continue
            alone, fitted = (loss(shape, c) for c in (clocks_of, partial(corrected, table)))
            found[f"{shape.out}: model alone"].append((shape.m, alone))
            found[f"{shape.out}: corrected"].append((shape.m, fitted))
            near = nearest(shape, seen)
            if near is not None:
                found[f"{shape.out}: nearest (N, K)"].append((shape.m, near))
    for name, losses in found.items():
        print(f"{name}, (N, K) held out")
        report(losses)


def parts(shapes: list[Shape], count: int) -> dict[tuple[int, int], int]:
    """A number from 0 to ``count`` - 1 for each (N, K), drawn."""
    pairs = sorted({(shape.n, shape.k) for shape in shapes})
    random.Random(0).shuffle(pairs)  # noqa: S311 - a partition, not a secret
    return {pair: number % count for number, pair in enumerate(pairs)}


def nearest(shape: Shape, others: list[Shape]) -> float | None:
    """What the winner of the nearest (N, K) at this M loses; None if it was not timed here."""
    same = [other for other in others if (other.m, other.out) == (shape.m, shape.out)]
    if not same:
        return None
    near = min(same, key=lambda o: math.log(o.n / shape.n) ** 2 + math.log(o.k / shape.k) ** 2)
    best = min(near.timed, key=lambda one: one.us).winner_name
    times = [one.us for one in shape.timed if one.winner_name == best]
    return math.log(times[0] / shape.best) if times else None


def judge_winners(shapes: list[Shape]) -> None:
    """What winners lose on another measurement of the shape, and at another M of the bucket."""
    groups: dict[tuple[int, int, int], list[Shape]] = defaultdict(list)
    for shape in shapes:
        groups[shape.n, shape.k, bucket(shape.m)].append(shape)
    again: list[tuple[int, float]] = []
    other: list[tuple[int, float]] = []
    for members in groups.values():
        for first in members:
            best = min(first.timed, key=lambda one: one.us).work.name
            for second in members:
                if second is first:
                    continue
                both = {o.work.name for o in first.timed} & {o.work.name for o in second.timed}
                times = {o.work.name: o.us for o in second.timed if o.work.name in both}
                if best in times:
                    where = again if first.m == second.m else other
                    where.append((second.m, math.log(times[best] / min(times.values()))))
    print("winners, same M, other measurement")
    report(again)
    print("winners, other M of the bucket")
    report(other)


def report(losses: list[tuple[int, float]]) -> None:
    """Geometric mean, 95th of a hundred and worst loss, by range of M."""
    for low, high in RANGES:
        found = sorted(value for m, value in losses if low <= m <= high)
        if found:
            parts = (mean(found), median(found), found[int(0.95 * (len(found) - 1))], found[-1])
            average, middle, late, worst = (f"{100 * math.expm1(part):5.1f}" for part in parts)
            print(
                f"  M {low:4d}-{high:4d}: mean {average} %, median {middle} %, p95 {late} %, "
                f"worst {worst} %, {len(found)} shapes"
            )


def rounded(table: Table) -> Table:
    """As it is written."""
    ranges = tuple((round(low, DIGITS), round(high, DIGITS)) for low, high in table.ranges)
    factors = {
        name: tuple(round(value, DIGITS) for value in row) for name, row in table.factors.items()
    }
    return replace(table, ranges=ranges, factors=factors)


def swept_on(sweeps: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """The machines of sweeps, and the packages of the last one."""
    heads = [json.loads(sweep.read_text(encoding="utf-8").splitlines()[0]) for sweep in sweeps]
    return ", ".join(dict.fromkeys(head["machine"] for head in heads)), heads[-1]["versions"]


def write(target: Path, sweeps: list[Path], table: Table, kept: dict[tuple[int, int], int]) -> None:
    """The table that ships, with where it comes from."""
    machines, packages = swept_on(sweeps)
    paths = [str(sweep.resolve().relative_to(ROOT)) for sweep in sweeps]
    commit, date = last_change(paths)
    document = {
        "schema": 1,
        "device": machines,
        "processors": table.processors,
        "packages": packages,
        "commit": commit,
        "date": date,
        "sources": paths,
        "held_out": sorted(pair for pair, part in kept.items() if not part),
        "ranges": table.ranges,
    }
    factors = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.factors.items()]
    rows = [
        f"  {json.dumps([n, k, ' '.join(f'{m}:{name}' for m, name in sorted(of_m.items()))])}"
        for (n, k), of_m in table.winners.items()
    ]
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    text = "{\n" + ",\n".join(lines)
    text += ',\n "factors": {\n' + ",\n".join(factors) + "\n },\n"
    text += ' "winners": [\n' + ",\n".join(rows) + "\n ]\n}\n"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {len(table.factors)} forms, {len(rows)} (N, K)")
