"""What today's choice would give against DeepGEMM: an estimate from records, not a measurement.

    python benchmarks/gluon_estimate.py [--machine nvidia-h100-80gb-hbm3]

For each (N, K, M) of ``gemm.jsonl``: gluon's measured time in float16, times how much faster the
work that would be chosen now is than the one that was timed then, by the sweep where it has both
("sweep"), else by the corrected model ("model"). Then, where the sweep has the shape, the fastest
of its candidates: below the goal of issue 4, a better kernel is needed and no choice helps. Records
and sweep may be of different kernels; needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean
from typing import TYPE_CHECKING, Any

from blockscale.kernels.gluon.choice import candidates, choose
from blockscale.kernels.gluon.corrections import clocks

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).resolve().parent / "results"
PROCESSORS = 132
# Range of M: geometric mean and worst that issue 4 asks for.
GOALS = {
    (1, 16): (1.20, 1.00),
    (32, 64): (1.10, 0.97),
    (128, 512): (1.03, 0.95),
    (1024, 8192): (1.02, 0.95),
}

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Speeds relative to DeepGEMM; ``best``: of the sweep's fastest, None without a sweep."""

    key: Key
    then: float
    now: float
    best: float | None
    source: str
    change: str


def main() -> int:
    """Read, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="nvidia-h100-80gb-hbm3")
    folder = RESULTS / parser.parse_args().machine
    found = list(estimates(folder))
    print("speed relative to deep_gemm bfloat16: geometric mean (worst); 'now' is an estimate")
    for (low, high), (goal, worst) in GOALS.items():
        own = [one for one in found if low <= one.key[0] <= high]
        if not own:
            continue
        then, now = [one.then for one in own], [one.now for one in own]
        print(
            f"  M {low}-{high}: then {geometric_mean(then):.3f} ({min(then):.2f}), "
            f"now {geometric_mean(now):.3f} ({min(now):.2f}), goal {goal} ({worst}), "
            f"{dict(Counter(one.source for one in own))}"
        )
    print("by shape, where the choice changed or the goal's worst is not reached")
    for one in found:
        m, n, k = one.key
        worst = next(w for (low, high), (_, w) in GOALS.items() if low <= m <= high)
        if one.source != "same" or one.now < worst:
            best = "" if one.best is None else f", fastest of the sweep {one.best:.2f}"
            print(
                f"  {n}x{k} M={m}: {one.then:.2f} -> {one.now:.2f} ({one.source}){best}"
                f"{'; NOT REACHED' if max(one.now, one.best or 0) < worst else ''}  {one.change}"
            )
    return 0


def estimates(folder: Path) -> Iterator[Estimate]:
    """One for each shape that both gluon and DeepGEMM were timed on."""
    sweep = swept(folder / "gluon_sweep.jsonl")
    records = json_lines(folder / "gemm.jsonl")
    by_key: dict[Key, dict[str, Any]] = defaultdict(dict)
    for line in records:
        wanted = {"gluon": "float16", "deep_gemm": "bfloat16"}.get(line["backend"])
        if line["out_dtype"] == wanted and not line["detail"].startswith("candidate"):
            by_key[line["m"], line["n"], line["k"]][line["backend"]] = line
    for key, lines in sorted(by_key.items(), key=lambda item: item[0][1:] + item[0][:1]):
        if len(lines) == 2:
            yield estimate(key, lines, sweep.get(key, {}))


def estimate(key: Key, lines: dict[str, Any], times: dict[str, float]) -> Estimate:
    """``times``: the sweep's, by work."""
    m, n, k = key
    then = lines["deep_gemm"]["time_us"] / lines["gluon"]["time_us"]
    old, new = lines["gluon"]["detail"], choose(m, n, k, 2, PROCESSORS)
    gain, source = 1.0, "same"
    if new.name != old:
        works = {work.name: work for work in candidates(m, n, k, 2, PROCESSORS)}
        if old in times and new.name in times:
            gain, source = times[old] / times[new.name], "sweep"
        elif old in works:
            costs = [clocks(work, m, n, 2, PROCESSORS) for work in (works[old], new)]
            gain, source = costs[0] / costs[1], "model"
        else:
            source = "unknown"
    best = then * times[old] / min(times.values()) if old in times else None
    return Estimate(key, then, then * gain, best, source, f"{old} -> {new.name}")


def swept(path: Path) -> dict[Key, dict[str, float]]:
    """Mean times of candidates that ship, by shape and work."""
    found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in json_lines(path):
        if "times" in line:
            m, n, k = line["m"], line["n"], line["k"]
            for work in candidates(m, n, k, 2, PROCESSORS):
                if work.name in line["times"]:
                    found[m, n, k][work.name].append(line["times"][work.name])
    return {key: {name: mean(t) for name, t in times.items()} for key, times in found.items()}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
