"""Speed of grouped products relative to DeepGEMM, from records of ``grouped.py``.

    python benchmarks/grouped_summary.py FILE...

Geometric mean, worst and number of cases by kind of case, backend and output, of the last record
of each; also of the faster of Gluon and ``gemm.cu`` ("best of ours"), and of the one of them that a
plan would take ("planned of ours": contiguous rows only, since no offer lists slots). Then the
cases where the best of ours is below the goal. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OURS = ("gluon", "cuda")
BEST, PLANNED = "best of ours", "planned of ours"
DEEP_GEMM = "deep_gemm"
# Of issue 5: geometric mean, worst.
GOAL = (1.00, 0.93)
# family, layout, tokens (of a routed case): what ``grouped_cases.Case.name`` says.
NAME = re.compile(r"(\w+?)-(contiguous|masked|blocks\d+)-(?:t(\d+)|\d+x\d+)-(.*)")
# Experts of a token in those cases, and what planning supposes.
TOP = 8


@dataclass(frozen=True, slots=True)
class Point:
    """One time; ``ratio``: DeepGEMM's over it. ``kind``: family and layout."""

    case: str
    kind: str
    backend: str
    out_dtype: str
    ratio: float
    is_planned: bool

    @property
    def is_aligned(self) -> bool:
        """Whether it is in the layout that DeepGEMM has too."""
        return "blocks" not in self.kind


def points(records: Iterable[dict[str, Any]]) -> list[Point]:
    """What was chosen, where DeepGEMM's time is known; of low row blocks its masked one."""
    last = {(r["case"], r["backend"], r["out_dtype"]): r for r in records if r["chosen"]}
    base = {case: r["time_us"] for (case, name, _), r in last.items() if name == DEEP_GEMM}
    found = []
    for (case, backend, out_dtype), r in last.items():
        named = NAME.fullmatch(case)
        theirs = base.get(re.sub(r"-blocks\d+-", "-masked-", case))
        if named is None or theirs is None:
            continue
        kind = f"{named[1]} {named[2]}"
        tokens = int(named[3] or r["m"] // TOP)
        asked = (r["groups"], r["n"], r["k"], out_dtype, tokens)
        is_planned = named[2] == "contiguous" and backend == planned(*asked)
        ratio = theirs / r["time_us"]
        found.append(Point(case, kind, backend, out_dtype, ratio, is_planned))
    return found


@cache
def planned(experts: int, n: int, k: int, out_dtype: str, tokens: int) -> str:
    """Which of our kernels a plan takes for one such product, were there no others."""
    out = DType(out_dtype)
    request = LinearRequest("experts", n, k, FP8_128X128_FP32, out, out, experts=experts)
    ours = [backend for backend in BACKENDS if backend.name in OURS]
    plan = plan_linear(request, Device.named("sm_90"), PlanPolicy(), ours)
    return next(c.offer.backend for c in plan.choices if c.m_range.contains(tokens))


def best_of_ours(found: Iterable[Point]) -> list[Point]:
    """The faster of our kernels of each case and output, where both were timed."""
    both: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in found:
        if point.backend in OURS:
            both[point.case, point.out_dtype].append(point)
    return [
        replace(max(pair, key=lambda point: point.ratio), backend=BEST)
        for pair in both.values()
        if len(pair) == len(OURS)
    ]


def summary(records: Iterable[dict[str, Any]]) -> str:
    """The table as text, and the cases below the goal."""
    found = points(records)
    best = best_of_ours(found)
    chosen = [replace(point, backend=PLANNED) for point in found if point.is_planned]
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for point in (*found, *best, *chosen):
        kinds = [point.kind]
        if point.is_aligned and point.backend != DEEP_GEMM:
            kinds.append("all")
        for kind in kinds:
            groups[kind, point.backend, point.out_dtype].append(point.ratio)
    lines = ["speed relative to deep_gemm bfloat16: geometric mean (worst) of N cases"]
    lines += [
        f"  {kind:22s} {backend:16s} {out_dtype:9s} {mean_and_worst(ratios)}"
        for (kind, backend, out_dtype), ratios in groups.items()
    ]
    return "\n".join([*lines, *below(best)])


def mean_and_worst(ratios: Sequence[float]) -> str:
    """``1.049 (0.862) 29``."""
    return f"{geometric_mean(ratios):.3f} ({min(ratios):.3f}) {len(ratios)}"


def below(best: Iterable[Point]) -> list[str]:
    """The cases whose best is below the goal's worst, the slowest first."""
    slow = sorted((point for point in best if point.ratio < GOAL[1]), key=lambda p: p.ratio)
    if not slow:
        return []
    words = [f"  {point.ratio:.3f} {point.out_dtype:9s} {point.case}" for point in slow]
    return [f"best of ours below {GOAL[1]}:", *words]


def main() -> int:
    """Print the summary of some files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    lines = [
        line
        for file in parser.parse_args().files
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    records = [json.loads(line) for line in lines if line.strip()]
    print(summary(r for r in records if r["benchmark"] == "grouped"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
