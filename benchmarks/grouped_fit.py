"""What the choice for groups loses, and the thresholds that would have lost least.

    python benchmarks/grouped.py --cases masked,contiguous --variants --dtypes bfloat16 \
        --seconds 90 --out FILE          (on a GPU)
    python benchmarks/grouped_fit.py FILE

Reads records that have every variant. For each case: the choice, the fastest, what the choice loses
and the fastest's speed relative to DeepGEMM: below 1 no choice reaches it, and a better kernel is
needed. Then the constants of ``kernels.gluon.grouped_choice`` of all combinations in ``GRID`` that
lose least, today's in front if nothing is better. Needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean

from blockscale.kernels.gluon import grouped_choice
from grouped_cases import Case, all_cases

PROCESSORS = 132
# Today's value first.
GRID: dict[str, tuple[float, ...]] = {
    "MAX_FEW_ROWS": (64, 16, 32, 48, 96, 128),
    "SPREAD": (1.5, 1.0, 1.25, 2.0, 3.0),
    "ROWS_FOR_WIDE_TILES": (512, 256, 1024, 2048),
    "ROWS_FOR_WIDE_SLOTS": (128, 64, 192, 256, 512),
}
# A record counts if the fastest of its case is not alone.
LEAST_VARIANTS = 2


def main() -> int:
    """Read, judge, search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    cases, base = read(parser.parse_args().records)
    if not cases:
        print("no case with several variants: run grouped.py with --variants")
        return 1
    chosen = {case: choice(case) for case in cases}
    print("loss and speed relative to DeepGEMM by case")
    for case, times in cases.items():
        best = min(times, key=times.__getitem__)
        lost = times[chosen[case]] / times[best] - 1 if chosen[case] in times else math.nan
        ratio = base[case] / times[best] if case in base else math.nan
        print(f"  {case.name:42s} {lost:6.1%} {ratio:6.3f}  {chosen[case]}, fastest {best}")
    found = search(cases)
    for loss, values in found[:3]:
        print(f"{loss:.3f}  " + ", ".join(f"{name} = {value}" for name, value in values.items()))
    return 0


def read(path: Path) -> tuple[dict[Case, dict[str, float]], dict[Case, float]]:
    """Microseconds by case and variant in bfloat16, and DeepGEMM's."""
    known = {case.name: case for case in all_cases()}
    times: dict[Case, dict[str, float]] = defaultdict(dict)
    base: dict[Case, float] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        case = known.get(line.get("case", ""))
        if case is None or line["out_dtype"] != "bfloat16":
            continue
        if line["backend"] == "deep_gemm":
            base[case] = line["time_us"]
        elif line["backend"] == "gluon":
            times[case][line["detail"]] = line["time_us"]
    return {case: found for case, found in times.items() if len(found) >= LEAST_VARIANTS}, base


def choice(case: Case) -> str:
    """The name of what serves a case."""
    if case.layout == "masked":
        found = grouped_choice.choose_masked(case.groups, case.slot, case.likely, 2)
    else:
        blocks = sum(-(-count // case.alignment) for count in case.counts(0))
        found = grouped_choice.choose_contiguous(
            case.groups, blocks, case.alignment, case.n, 2, PROCESSORS
        )
    return found.name


def search(cases: dict[Case, dict[str, float]]) -> list[tuple[float, dict[str, float]]]:
    """Geometric mean of chosen / fastest by constants, best first; a tie leaves today's in front.

    A choice that was not timed counts as the slowest that was.
    """
    today = {name: getattr(grouped_choice, name) for name in GRID}
    found = []
    for values in itertools.product(*GRID.values()):
        constants = dict(zip(GRID, values, strict=True))
        apply(constants)
        ratios = [
            times.get(choice(case), max(times.values())) / min(times.values())
            for case, times in cases.items()
        ]
        found.append((geometric_mean(ratios), constants))
    apply(today)
    return sorted(found, key=lambda pair: pair[0])


def apply(constants: dict[str, float]) -> None:
    """Put constants into the module for this process, and forget its answers."""
    for name, value in constants.items():
        setattr(grouped_choice, name, value)
    grouped_choice.choose_contiguous.cache_clear()
    grouped_choice.choose_masked.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
