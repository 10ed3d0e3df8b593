"""What the records of gemm.py say: speed beside DeepGEMM by range of M, what bounds it, decode.

    python benchmarks/gemm_summary.py FILE [FILE ...]

Reads JSON lines, needs no GPU. ``gemm.py`` prints this at its end, ``tools/tables.py`` and
``tools/plots.py`` write it into the documents: one place says what a region, a bound and a share
are.

A ratio is DeepGEMM's time over a backend's: above 1 is faster. Both were replayed in turns, in one
process. DeepGEMM writes bfloat16, so every output is compared with its bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BASELINE = ("deep_gemm", "bfloat16")
PLAIN = ("triton", "float16")
# Backends of blockscale that the planner chooses from: one prepared weight serves both.
OURS = ("gluon", "cuda")
BEST, PLANNED = "best of ours", "planned of ours"
RANGES = ((1, 16), (32, 64), (128, 512), (1024, 8192))
# Issue 4: geometric mean and worst shape by range, float16 and bfloat16; float32 where stores do
# not bound it; the share of the copy bandwidth for M of 16 or fewer and weights of 29 MB and more.
GOALS = ((1.20, 1.00), (1.10, 0.97), (1.03, 0.95), (1.02, 0.95))
FLOAT32_GOAL = 0.95
DECODE_GOAL, DECODE_TOKENS, DECODE_BYTES = 0.80, 16, 29_000_000
OUT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
STORES = "stores"
# What L2 takes of stores from all multiprocessors: 2,200 bytes a clock at 1.4 GHz, which is less
# than memory's bandwidth (H100, 2026-11-27, perf-log G45). The shares of a product's time that a
# table tells apart.
L2_INTAKE_GB_S = 3.1e3
INTAKE_SHARES = ((0.0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 1.0), (1.0, float("inf")))
VERDICTS = {True: "reached", False: "missed"}
# Details of what was timed beside a backend's own choice.
EXPERIMENTS = ("overlap", "alternate", "loads", "candidate")


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a product under the measured ceilings, in microseconds of each cause."""

    tensor_cores: float
    operands: float
    stores: float

    @property
    def us(self) -> float:
        """All bytes at the copy bandwidth, or all products at the FP8 rate, whichever is more."""
        return max(self.tensor_cores, self.operands + self.stores)

    @property
    def bound(self) -> str:
        """The cause: tensor cores, or else the larger part of the bytes."""
        if self.tensor_cores >= self.operands + self.stores:
            return "tensor cores"
        return STORES if self.stores > self.operands else "operands"


def floor_of(m: int, n: int, k: int, out_bytes: int, ceilings: dict[str, float]) -> Floor:
    """Floor of an (m, n, k) product: FP8 operands, a result of ``out_bytes`` a value."""
    per_us = ceilings["copy_gb_s"] * 1e3
    return Floor(
        2 * m * n * k / (ceilings["fp8_tensor_wise_tflops"] * 1e6),
        (m + n) * k / per_us,
        m * n * out_bytes / per_us,
    )


@dataclass(frozen=True, slots=True)
class Point:
    """A backend's time on one shape. ``ratio``: DeepGEMM's over it, None where that did not run."""

    m: int
    n: int
    k: int
    backend: str
    out_dtype: str
    time_us: float
    ratio: float | None
    is_planned: bool
    floor: Floor
    share_of_copy: float
    detail: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, k)."""
        return self.m, self.n, self.k

    @property
    def words(self) -> str:
        """The shape, as tables have it."""
        return f"{self.m} x {self.n} x {self.k}"


def counted(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each measurement by the last source; experiments are left out.

    Sources are not mixed within a pass: those records count that have the commit of its last one.
    Records without a pass (before 2026-11-26) count where there are no others.
    """
    kept = [r for r in records if not r["detail"].startswith(EXPERIMENTS)]
    if any("pass" in r for r in kept):
        kept = [r for r in kept if "pass" in r]
    commits = {r.get("pass"): r["commit"] for r in kept}
    kept = [r for r in kept if r["commit"] == commits[r.get("pass")]]
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in kept:
        key = (r["m"], r["n"], r["k"], r["backend"], r["out_dtype"])
        last.pop(key, None)  # The last line of the file comes last.
        last[key] = r
    return list(last.values())


def points(records: Iterable[dict[str, Any]]) -> list[Point]:
    """What counts of some records."""
    found = counted(records)
    base = {
        (r["m"], r["n"], r["k"]): r["time_us"]
        for r in found
        if (r["backend"], r["out_dtype"]) == BASELINE
    }
    return [_point(r, base) for r in found]


def _point(r: dict[str, Any], base: dict[tuple[int, int, int], float]) -> Point:
    # Records from before there were passes do not hold DeepGEMM's time.
    before = None if "pass" in r else base.get((r["m"], r["n"], r["k"]))
    deep_gemm_us = r.get("deep_gemm_us", before)
    return Point(
        r["m"],
        r["n"],
        r["k"],
        r["backend"],
        r["out_dtype"],
        r["time_us"],
        deep_gemm_us / r["time_us"] if deep_gemm_us else None,
        r.get("planned", False),
        floor_of(r["m"], r["n"], r["k"], OUT_BYTES[r["out_dtype"]], r["ceilings"]),
        r["share_of_copy"],
        r["detail"],
    )


def best_of_ours(found: Sequence[Point], out_dtype: str) -> list[Point]:
    """The faster of the project's own kernels for each shape."""
    best: dict[tuple[int, int, int], Point] = {}
    for point in found:
        if point.backend in OURS and point.out_dtype == out_dtype:
            other = best.get(point.shape)
            if other is None or point.time_us < other.time_us:
                best[point.shape] = point
    return list(best.values())


def variants(found: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by backend and output; and what the planner takes of ours, and the faster of ours."""
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in found:
        groups[point.backend, point.out_dtype].append(point)
    extra: dict[tuple[str, str], list[Point]] = {}
    for out_dtype in OUT_BYTES:
        if all((name, out_dtype) in groups for name in OURS):
            extra[BEST, out_dtype] = best_of_ours(found, out_dtype)
        planned = [p for p in found if p.is_planned and p.out_dtype == out_dtype]
        if planned:
            extra[PLANNED, out_dtype] = planned
    return {**groups, **extra}


def within(found: Iterable[Point], where: tuple[int, int]) -> list[Point]:
    """Those of a range of M."""
    return [point for point in found if where[0] <= point.m <= where[1]]


def mean_and_worst(found: Iterable[Point]) -> str:
    """Geometric mean of the ratios to DeepGEMM, and the worst in brackets; "not run" of none."""
    ratios = [point.ratio for point in found if point.ratio is not None]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "not run"


Table = tuple[list[str], list[list[str]]]


def regions(found: Sequence[Point]) -> Table:
    """Speed relative to DeepGEMM by backend, output and range of M."""
    body = [["goal", "16 bits", *(f"{mean:.2f} ({worst:.2f})" for mean, worst in GOALS)]]
    for (backend, out_dtype), group in variants(found).items():
        if backend == BASELINE[0]:
            continue
        cells = [mean_and_worst(within(group, where)) for where in RANGES]
        body.append(
            [f"`{backend}`" if backend not in (BEST, PLANNED) else backend, out_dtype, *cells]
        )
    return ["backend", "output", *(f"M {low}-{high}" for low, high in RANGES)], body


def short_regions(found: Sequence[Point]) -> Table:
    """Of ``regions``: what the planner takes of ours, else Gluon's; in float16 what it replaces."""
    header, body = regions(found)
    own = PLANNED if any(row[0] == PLANNED for row in body) else f"`{OURS[0]}`"
    wanted = {
        ("goal", "16 bits"),
        (own, "float16"),
        (own, "bfloat16"),
        ("`torch_scaled_mm`", "float16"),
        ("`triton`", "float16"),
        ("`bf16_matmul`", "bfloat16"),
    }
    return header, [row for row in body if (row[0], row[1]) in wanted]


def float32(found: Sequence[Point]) -> Table:
    """float32 output beside DeepGEMM's bfloat16, apart where stores bound it."""
    body: list[list[str]] = []
    for (backend, out_dtype), group in variants(found).items():
        if out_dtype != "float32":
            continue
        for name, wanted in (("do not bind", False), ("bind", True)):
            part = [p for p in group if (p.floor.bound == STORES) == wanted]
            cells = [mean_and_worst(within(part, where)) for where in RANGES]
            body.append([backend, name, str(len(part)), *cells])
    header = ["float32 output", "stores", "shapes", *(f"M {low}-{high}" for low, high in RANGES)]
    return header, body


def intake(found: Sequence[Point]) -> Table:
    """Our best float32, by the share of float16's time that L2 takes to take float32 stores."""
    times = {point.shape: point.time_us for point in best_of_ours(found, "float16")}
    us_per_result = OUT_BYTES["float32"] / (L2_INTAKE_GB_S * 1e3)
    shares = {
        point: point.m * point.n * us_per_result / times[point.shape]
        for point in best_of_ours(found, "float32")
        if point.shape in times
    }
    body: list[list[str]] = []
    for low, high in INTAKE_SHARES:
        part = [point for point, share in shares.items() if low <= share < high]
        if not part:
            continue
        slower = geometric_mean(point.time_us / times[point.shape] for point in part)
        below = sum(point.ratio is not None and point.ratio < FLOAT32_GOAL for point in part)
        words = f"{low:.1%} to {high:.1%}" if high <= 1 else f"{low:.0%} and more"
        cells = [str(len(part)), f"{slower:.2f}x", mean_and_worst(part), str(below)]
        body.append([words.replace(".0%", "%"), *cells])
    names = ["stores at L2's intake, of float16's time", "shapes", "float32 takes", "of DeepGEMM"]
    return [*names, f"below {FLOAT32_GOAL}"], body


def bounds(found: Sequence[Point]) -> Table:
    """What the floor of each range is made of, and how near kernels come to it (float16)."""
    body: list[list[str]] = []
    groups = variants(found)
    own = groups.get((BEST, "float16")) or groups.get((OURS[0], "float16"), [])
    base = {point.shape: point for point in groups.get(BASELINE, [])}
    for where in RANGES:
        by_bound: dict[str, list[Point]] = defaultdict(list)
        for point in within(own, where):
            by_bound[point.floor.bound].append(point)
        for bound, group in sorted(by_bound.items()):
            theirs = [base[p.shape] for p in group if p.shape in base]
            far = max(group, key=lambda p: p.time_us / p.floor.us)
            body.append(
                [
                    f"M {where[0]}-{where[1]}",
                    bound,
                    str(len(group)),
                    *(_share(part) for part in (group, theirs)),
                    f"{far.words}: {far.floor.us / far.time_us:.0%}",
                ]
            )
    names = ["region", "floor set by", "shapes", "best of ours reaches", "DeepGEMM reaches"]
    return [*names, "furthest from it (M x N x K)"], body


def _share(group: Sequence[Point]) -> str:
    return f"{geometric_mean(p.floor.us / p.time_us for p in group):.0%}" if group else "not run"


def decode(found: Sequence[Point]) -> Table:
    """Share of the copy bandwidth at M of 16 or fewer, weights of 29 MB and more."""
    groups = variants(found)
    names = [v for v in groups if v[0] not in OURS or (BEST, v[1]) not in groups]
    names = [v for v in names if v[1] != "float32" and v[0] != "bf16_matmul"]
    chosen = {v: [p for p in groups[v] if _is_large_decode(p)] for v in names}
    shapes = sorted(
        {(p.n, p.k) for group in chosen.values() for p in group}, key=lambda s: s[0] * s[1]
    )
    body = [
        [
            backend,
            out_dtype,
            *(_lowest([p for p in group if (p.n, p.k) == shape]) for shape in shapes),
        ]
        for (backend, out_dtype), group in chosen.items()
        if group
    ]
    sizes = [f"{n} x {k}, {n * k / 1e6:.0f} MB" for n, k in shapes]
    return ["backend", "output", *sizes], body


def _lowest(group: Sequence[Point]) -> str:
    if not group:
        return "not run"
    shares = [p.share_of_copy for p in group]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def slowest(found: Sequence[Point], count: int = 8) -> Table:
    """The shapes where the faster of our kernels is furthest behind DeepGEMM (float16)."""
    own = variants(found).get((BEST, "float16")) or variants(found).get((OURS[0], "float16"), [])
    behind = sorted((p for p in own if p.ratio is not None), key=lambda p: p.ratio or 0)[:count]
    body = [
        [
            p.words,
            f"{p.ratio:.2f}",
            f"{p.time_us:.1f} us",
            p.floor.bound,
            f"{p.floor.us / p.time_us:.0%}",
            f"{p.backend} {p.detail}",
        ]
        for p in behind
    ]
    return ["M x N x K", "of DeepGEMM", "time", "floor set by", "of the floor", "tile"], body


def goals(found: Sequence[Point]) -> Table:
    """Each goal of issue 4, and what the faster of our kernels and the planner's choice reach.

    Where only one of our kernels ran, it is the faster.
    """
    groups = variants(found)
    names = [name for name in (BEST, PLANNED) if any(key[0] == name for key in groups)] or [OURS[0]]
    body: list[list[str]] = []
    for out_dtype in ("bfloat16", "float16"):
        for where, goal in zip(RANGES, GOALS, strict=True):
            parts = [within(groups.get((name, out_dtype), []), where) for name in names]
            if any(parts):
                region = f"M {where[0]}-{where[1]}, {out_dtype}"
                wanted = f"{goal[0]:.2f} ({goal[1]:.2f}) of DeepGEMM"
                body.append([region, wanted, *(_judged(part, goal) for part in parts)])
    for of, wanted, judge in _OTHER_GOALS:
        cells = [judge(groups, name) for name in names]
        if any(cells):
            body.append([of, wanted, *(cell or "not run" for cell in cells)])
    return ["of", "goal", *names], body


def _judged(part: Sequence[Point], goal: tuple[float, float]) -> str:
    ratios = [point.ratio for point in part if point.ratio is not None]
    if not ratios:
        return "not run"
    is_reached = geometric_mean(ratios) >= goal[0] and min(ratios) >= goal[1]
    return f"{mean_and_worst(part)}: {VERDICTS[is_reached]}"


Groups = dict[tuple[str, str], list[Point]]


def _float32_goal(groups: Groups, name: str) -> str:
    free = [p for p in groups.get((name, "float32"), []) if p.floor.bound != STORES]
    under = [p for p in free if p.ratio is not None and p.ratio < FLOAT32_GOAL]
    if not any(p.ratio is not None for p in free):
        return ""
    words = f"{mean_and_worst(free)}, {len(under)} of {len(free)} below"
    return f"{words}: {VERDICTS[not under]}"


def _decode_goal(groups: Groups, name: str) -> str:
    large = [p for p in groups.get((name, "float16"), []) if _is_large_decode(p)]
    if not large:
        return ""
    low = [p for p in large if p.share_of_copy < DECODE_GOAL]
    least = min(large, key=lambda p: p.share_of_copy)
    words = f"{least.share_of_copy:.0%} at {least.words}, {len(low)} of {len(large)} below"
    return f"{words}: {VERDICTS[not low]}"


def _plain_goal(groups: Groups, name: str) -> str:
    plain = {p.shape: p.time_us for p in groups.get(PLAIN, [])}
    own = [p for p in groups.get((name, PLAIN[1]), []) if p.shape in plain]
    if not own:
        return ""
    worst = min(own, key=lambda p: plain[p.shape] / p.time_us)
    slower = [p for p in own if p.time_us > plain[p.shape]]
    least = plain[worst.shape] / worst.time_us
    words = f"{least:.2f} at {worst.words}, {len(slower)} of {len(own)} slower"
    return f"{words}: {VERDICTS[not slower]}"


def _is_large_decode(point: Point) -> bool:
    return point.m <= DECODE_TOKENS and point.n * point.k >= DECODE_BYTES


_OTHER_GOALS: tuple[tuple[str, str, Callable[[Groups, str], str]], ...] = (
    (
        "all M, float32 where stores do not bind",
        f"{FLOAT32_GOAL} of DeepGEMM on every shape",
        _float32_goal,
    ),
    (
        f"M 1-{DECODE_TOKENS}, float16, weights of 29 MB and more",
        f"{DECODE_GOAL:.0%} of the copy bandwidth on every shape",
        _decode_goal,
    ),
    ("all M, float16", "1.00 of plain Triton in float16 on every shape", _plain_goal),
)


TABLES: tuple[Callable[[Sequence[Point]], Table], ...] = (
    regions,
    goals,
    float32,
    intake,
    bounds,
    decode,
    slowest,
)


def summary(records: Iterable[dict[str, Any]]) -> str:
    """Everything above as text."""
    found = points(records)
    parts = [_aligned(*table(found)) for table in TABLES]
    return "\n\n".join(part for part in parts if part)


def _aligned(header: list[str], body: list[list[str]]) -> str:
    if not body:
        return ""
    lines = [header, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    """Print the summary of some files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    records = [
        json.loads(line)
        for file in parser.parse_args().files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    print(summary(r for r in records if r["benchmark"] == "gemm"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
