"""Fits what Gluon takes of gemm.cu's time for experts, and says what choosing by it loses.

    python benchmarks/grouped_times_fit.py [FILE...] [--write]

FILE: ``grouped.py``'s records, of one GPU each; without any, all that are committed. Which of them
count says ``grouped_records.py``: those of the kernels that are chosen today. Where only one family
has a time that counts on some GPU, the other's comes from another GPU, by DeepGEMM's times on both
("carried over").

For each GPU, by number of experts and tokens: what is lost against the faster of the two families
by each alone, by the table that ships, by a fit to the other GPUs, and by one to all (N, K) but the
one that is judged, with the error of the ratio in percent. Then what slots of rows would take of
the time of the rows that plans take, where both were timed: no offer lists slots.

``--write`` writes ``src/blockscale/kernels/tables/grouped_times.json``, fitted to everything. Needs
no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING

import torch

from blockscale.kernels.grouped_times import ROWS, Behind, shipped, terms
from grouped_records import DEEP_GEMM, FAMILIES, RESULTS, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from grouped_records import Product, Times

ROOT = RESULTS.parent.parent
TARGET = ROOT / "src" / "blockscale" / "kernels" / "tables" / "grouped_times.json"
# How strongly a level is held near the next, and the slope near zero, against one observation.
RIDGE = 0.1
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """A product; ``behind``: log(Gluon's time / that of gemm.cu)."""

    product: Product
    behind: float
    is_carried: bool

    @property
    def weight(self) -> int:
        """Bytes of a group's."""
        return self.product.n * self.product.k

    def lost(self, behind: float) -> float:
        """log(chosen / faster), where ``behind`` chooses."""
        return abs(self.behind) if (behind > 0) != (self.behind > 0) else 0.0


def main() -> int:
    """Read, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*/grouped.jsonl"))
    times, left = read(files)
    for reason, count in left.items():
        print(f"{count} records left out: {reason}")
    seen = observed(times)
    if not seen:
        print("no product that both families have times for")
        return 1
    for machine in sorted({one.product.machine for one in seen}):
        judge(machine, seen)
    print_slots(times)
    fitted = fit(seen)
    print(f"\nfitted to everything: {fitted}")
    if options.write:
        write(files, fitted)
    return 0


def observed(times: Mapping[Product, Times]) -> list[Seen]:
    """Every product that both families have a time for, carried over where one is missing."""
    machines = sorted({product.machine for product in times})
    found = []
    for product, own in times.items():
        us = {
            family: own.planned.get(family) or carried(family, product, times, machines)
            for family in FAMILIES
        }
        if us["gluon"] and us["cuda"] and own.planned.keys() & FAMILIES:
            is_carried = not own.planned.keys() >= set(FAMILIES)
            found.append(Seen(product, math.log(us["gluon"] / us["cuda"]), is_carried))
    return found


def carried(
    family: str, product: Product, times: Mapping[Product, Times], machines: Iterable[str]
) -> float | None:
    """A time from another machine, the mean where several have one."""
    here = base(product, times)
    found = []
    for machine in machines:
        other = replace(product, machine=machine)
        there = base(other, times)
        if here and there and family in times[other].planned:
            found.append(times[other].planned[family] * here / there)
    return geometric_mean(found) if found else None


def base(product: Product, times: Mapping[Product, Times]) -> float | None:
    """DeepGEMM's time; it has bfloat16 results only, and slots alone where there are few rows."""
    own = times.get(replace(product, out_dtype="bfloat16"))
    if product not in times or own is None:
        return None
    return (own.masked | own.planned).get(DEEP_GEMM)


def fit(seen: Sequence[Seen]) -> Behind:
    """Least squares; a level that nothing was measured for lies where its neighbours say."""
    products = [one.weight for one in seen]
    weights = min(products), max(products)
    rows = [terms(one.product.rows, one.weight, weights) for one in seen]
    design = torch.tensor(rows, dtype=torch.float64)
    gram = design.T @ design
    last = len(ROWS) - 1
    for index in range(last):
        gram[index : index + 2, index : index + 2] += RIDGE * torch.tensor([[1.0, -1], [-1, 1]])
    gram[-1, -1] += RIDGE
    behind = torch.tensor([one.behind for one in seen], dtype=torch.float64)
    *levels, slope = torch.linalg.solve(gram, design.T @ behind).tolist()
    return Behind(tuple(round(x, DIGITS) for x in levels), round(slope, DIGITS), weights)


def judge(machine: str, seen: Sequence[Seen]) -> None:
    """Print losses and errors on one machine."""
    own = [one for one in seen if one.product.machine == machine]
    others = [one for one in seen if one.product.machine != machine and not one.is_carried]
    kept_out = {(one.product.n, one.product.k): fit_without(one, seen) for one in own}
    ways: dict[str, Callable[[Seen], float]] = {
        "gluon alone": lambda _: -math.inf,
        "cuda alone": lambda _: math.inf,
        "as it ships": lambda one: shipped().at(one.product.rows, one.weight),
        "(N, K) left out": lambda one: kept_out[one.product.n, one.product.k].at(
            one.product.rows, one.weight
        ),
    }
    if others:
        abroad = fit(others)
        ways["another GPU's"] = lambda one: abroad.at(one.product.rows, one.weight)
    kinds: dict[str, list[Seen]] = defaultdict(list)
    for one in own:
        kinds[f"{one.product.experts} experts, {one.product.tokens} tokens"].append(one)
    kinds["all"] = own
    count = sum(one.is_carried for one in own)
    print(f"\n{machine}: {len(own)} products, {count} of them with a time carried over")
    for kind, group in kinds.items():
        print(f"  {kind} ({len(group)})")
        for words, way in ways.items():
            print(f"    {words:16s} {said(group, way)}")


def fit_without(one: Seen, seen: Iterable[Seen]) -> Behind:
    """Fitted to what has another (N, K), on any machine; as it ships if there is nothing else."""
    shape = one.product.n, one.product.k
    known = [other for other in seen if (other.product.n, other.product.k) != shape]
    return fit(known) if known else shipped()


def said(group: Sequence[Seen], way: Callable[[Seen], float]) -> str:
    """``lost 0.3 % (most 1.1 %), ratio off by 2.4 % (most 5.0 %)``; the second where it has one."""
    lost = [one.lost(way(one)) for one in group]
    words = f"lost {percent(fmean(lost))} (most {percent(max(lost))})"
    off = [abs(way(one) - one.behind) for one in group]
    if math.isinf(max(off)):
        return words
    root = math.sqrt(fmean([value * value for value in off]))
    return f"{words}, ratio off by {percent(root)} (most {percent(max(off))})"


def percent(logarithm: float) -> str:
    """``1.2 %``."""
    return f"{100 * math.expm1(logarithm):.1f} %"


def print_slots(times: Mapping[Product, Times]) -> None:
    """The time in slots of the time of the rows that the faster family's offer lists."""
    print("\nin slots / in the rows that the faster of ours takes by its offer")
    for product, own in times.items():
        planned = [own.planned[family] for family in FAMILIES if family in own.planned]
        slots = {family: own.masked[family] for family in FAMILIES if family in own.masked}
        if planned and slots:
            ratios = ", ".join(
                f"{family} {time_us / min(planned):.3f}" for family, time_us in slots.items()
            )
            size = f"{product.experts} x {product.n} x {product.k}, {product.tokens} tokens"
            print(f"  {product.machine}, {product.out_dtype}, {size}: {ratios}")


def write(files: Sequence[Path], fitted: Behind) -> None:
    """The table that ships, with where it comes from."""
    sources = [str(file.resolve().relative_to(ROOT)) for file in files]
    log = ["git", "log", "-1", "--format=%h %cs", "--", *sources]
    asked = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - git
    commit, _, date = asked.stdout.strip().partition(" ")
    document = {
        "schema": 1,
        "commit": commit,
        "date": date,
        "sources": sources,
        "rows": ROWS,
        "levels": fitted.levels,
        "per_doubling": fitted.per_doubling,
        "weights": fitted.weights,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
