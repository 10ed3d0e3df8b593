"""Fits what Gluon and DeepGEMM take of gemm.cu's time for experts, and what choosing by it loses.

    python benchmarks/grouped_times_fit.py [FILE...] [--write]

FILE: ``grouped.py``'s records, of one GPU each; without any, all that are committed. Which of them
count says ``grouped_records.py``: those of the kernels that are chosen today. Slots of rows stand
in for rows one after the other where only these were timed. Where a family has no time that counts
on one GPU, it comes from another, by DeepGEMM's times on both ("carried over").

For each GPU, by number of experts and tokens, between our two and, in bfloat16, with DeepGEMM: what
is lost against the fastest by each alone, by the table that ships, by a fit to the other GPUs, and
by one to all (N, K) but the one that is judged, with the error of the ratios in percent. Then what
slots would take of the time of the rows that plans take, where both were timed: no offer lists
slots.

``--write`` writes ``src/blockscale/kernels/tables/grouped_times.json``, fitted to everything. Needs
no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING

import torch

from blockscale.kernels.grouped_times import ROWS, Behind, shipped, terms
from grouped_records import DEEP_GEMM, FAMILIES, read
from record import RESULTS, ROOT, last_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from grouped_records import Product, Times

    Ratios = dict[str, Behind]

TARGET = ROOT / "src" / "blockscale" / "kernels" / "tables" / "grouped_times.json"
# What the others are measured by, and these.
UNIT, OTHERS = "cuda", ("gluon", DEEP_GEMM)
# How strongly a level is held near the next, and the slope near zero, against one observation.
RIDGE = 0.1
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """A product's microseconds by family, gemm.cu among them; ``carried``: not of this machine."""

    product: Product
    us: dict[str, float]
    carried: frozenset[str] = frozenset()

    @property
    def weight(self) -> int:
        """Bytes of a group's."""
        return self.product.n * self.product.k

    def behind(self, family: str) -> float:
        """log(time / gemm.cu's)."""
        return math.log(self.us[family] / self.us[UNIT])

    def fastest(self, ratios: Ratios, among: Iterable[str]) -> str:
        """Whom ratios choose."""
        guessed = {name: self.guess(ratios, name) for name in among if name in self.us}
        return min(guessed, key=guessed.__getitem__)

    def guess(self, ratios: Ratios, family: str) -> float:
        """What they say that ``behind`` is."""
        return ratios[family].at(self.product.rows, self.weight) if family in ratios else 0.0

    def lost(self, family: str, among: Iterable[str]) -> float:
        """log(its time / the fastest's)."""
        return math.log(self.us[family] / min(self.us[name] for name in among if name in self.us))


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
        print("no product that both of our families have times for")
        return 1
    for machine in sorted({one.product.machine for one in seen}):
        judge(machine, seen, FAMILIES)
        judge(machine, [one for one in seen if DEEP_GEMM in one.us], (*FAMILIES, DEEP_GEMM))
    print_slots(times)
    fitted = fit(seen)
    print(f"\nfitted to everything, at {ROWS} rows a group and for a doubling of its weight:")
    for family, behind in fitted.items():
        print(f"  {family}: {behind.levels}, {behind.per_doubling}")
    if options.write:
        write(files, fitted)
    return 0


def observed(times: Mapping[Product, Times]) -> list[Seen]:
    """Every product of which a plan's rows were timed, with times of both of our families."""
    machines = sorted({product.machine for product in times})
    found = []
    for product, own in times.items():
        if not own.planned.keys() & set(FAMILIES):
            continue
        us = of_rows(own)
        missing = [family for family in FAMILIES if family not in us]
        for family in missing:
            time_us = carried(family, product, times, machines)
            if time_us is not None:
                us[family] = time_us
        if us.keys() >= set(FAMILIES):
            found.append(Seen(product, us, frozenset(missing)))
    return found


def of_rows(own: Times) -> dict[str, float]:
    """Of rows one after the other, or of slots in their place."""
    known = (*FAMILIES, DEEP_GEMM)
    return {name: us for name, us in (own.masked | own.planned).items() if name in known}


def carried(
    family: str, product: Product, times: Mapping[Product, Times], machines: Iterable[str]
) -> float | None:
    """A time from other machines, the mean where several have one."""
    here = base(product, times)
    found = []
    for machine in machines:
        other = replace(product, machine=machine)
        there = base(other, times)
        if here and there and family in of_rows(times[other]):
            found.append(of_rows(times[other])[family] * here / there)
    return geometric_mean(found) if found else None


def base(product: Product, times: Mapping[Product, Times]) -> float | None:
    """DeepGEMM's time; it has bfloat16 results only."""
    own = times.get(replace(product, out_dtype="bfloat16"))
    return None if product not in times or own is None else of_rows(own).get(DEEP_GEMM)


def fit(seen: Sequence[Seen]) -> Ratios:
    """Least squares; a level that nothing was measured for lies where its neighbours say."""
    products = [one.weight for one in seen]
    weights = min(products), max(products)
    found = {}
    for family in OTHERS:
        known = [one for one in seen if family in one.us]
        if not known:
            continue
        rows = [terms(one.product.rows, one.weight, weights) for one in known]
        design = torch.tensor(rows, dtype=torch.float64)
        gram = design.T @ design
        for index in range(len(ROWS) - 1):
            gram[index : index + 2, index : index + 2] += RIDGE * torch.tensor([[1.0, -1], [-1, 1]])
        gram[-1, -1] += RIDGE
        behind = torch.tensor([one.behind(family) for one in known], dtype=torch.float64)
        *levels, slope = torch.linalg.solve(gram, design.T @ behind).tolist()
        found[family] = Behind(
            tuple(round(level, DIGITS) for level in levels), round(slope, DIGITS), weights
        )
    return found


def judge(machine: str, seen: Sequence[Seen], among: Sequence[str]) -> None:
    """Print losses and errors on one machine, where ``among`` these is chosen."""
    own = [one for one in seen if one.product.machine == machine]
    if not own:
        return
    others = [one for one in seen if one.product.machine != machine and not one.carried]
    kept_out = {(one.product.n, one.product.k): fit_without(one, seen) for one in own}
    ways: dict[str, Callable[[Seen], Ratios]] = {
        "as it ships": lambda _: shipped(),
        "(N, K) left out": lambda one: kept_out[one.product.n, one.product.k],
    }
    if others:
        abroad = fit(others)
        ways["another GPU's"] = lambda _: abroad
    kinds: dict[str, list[Seen]] = defaultdict(list)
    for one in own:
        kinds[f"{one.product.experts} experts, {one.product.tokens} tokens"].append(one)
    kinds["all"] = own
    count = sum(bool(one.carried) for one in own)
    print(f"\n{machine}, {', '.join(among)}: {len(own)} products, {count} with a time carried over")
    for kind, group in kinds.items():
        print(f"  {kind} ({len(group)})")
        for family in among:
            known = [one for one in group if family in one.us]
            print(f"    {f'{family} alone':16s} {said([one.lost(family, among) for one in known])}")
        for words, way in ways.items():
            lost = [one.lost(one.fastest(way(one), among), among) for one in group]
            off = [
                one.guess(way(one), family) - one.behind(family)
                for one in group
                for family in among
                if family != UNIT and family in one.us
            ]
            root = math.sqrt(fmean([value * value for value in off]))
            most = max(map(abs, off))
            errors = f"ratio off by {percent(root)} (most {percent(most)})"
            print(f"    {words:16s} {said(lost)}, {errors}")


def fit_without(one: Seen, seen: Iterable[Seen]) -> Ratios:
    """Fitted to what has another (N, K), on any machine; as it ships if there is nothing else."""
    shape = one.product.n, one.product.k
    known = [other for other in seen if (other.product.n, other.product.k) != shape]
    return fit(known) if known else shipped()


def said(lost: Sequence[float]) -> str:
    """``lost 0.3 % (most 1.1 %)``."""
    return f"lost {percent(fmean(lost))} (most {percent(max(lost))})"


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


def write(files: Sequence[Path], fitted: Ratios) -> None:
    """The table that ships, with where it comes from."""
    sources = [str(file.resolve().relative_to(ROOT)) for file in files]
    commit, date = last_change(sources)
    document = {
        "schema": 1,
        "commit": commit,
        "date": date,
        "sources": sources,
        "rows": ROWS,
        "weights": next(iter(fitted.values())).weights,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    rows = [
        f"  {json.dumps(family)}: {json.dumps([*behind.levels, behind.per_doubling])}"
        for family, behind in fitted.items()
    ]
    lines.append(' "behind": {\n' + ",\n".join(rows) + "\n }")
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
