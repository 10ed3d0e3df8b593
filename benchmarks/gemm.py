"""Dense block-FP8 GEMM on one GPU: every backend in turns, checked before it is timed.

    python benchmarks/ahead.py gemm          (first: compiles on all cores)
    python benchmarks/gemm.py [--pass main|rest|peers] [--shapes 4096x7168,...] [--tokens 1,8,...]
                              [--backends gluon,deep_gemm,...] [--dtypes float16,bfloat16]
                              [--seconds 300] [--state FILE] [--experiments]
                              [--out FILE | --record]

For each (N, K) and M: backends that can run the shape, and a bfloat16 product of the same shape.
Weights, activations and results rotate over copies that together are several times the L2 cache;
one CUDA graph goes through all copies; graphs are replayed in turns. A result that is not near the
float64 product of the dequantized operands is reported and not timed. Activations are quantized
already: quantizing is not part of any backend's time. The reduction of a split sum is.

The pass ``main`` has what is compared first: the project's kernels in 16 bits, DeepGEMM, plain
Triton in float16. ``rest`` has float32, cuBLASLt, the rest of Triton and the bfloat16 product, with
DeepGEMM again, in turns with them. Without ``--pass`` both run, ``main`` for all (N, K) first.
``peers`` has FlashInfer, which compiles when it is called, and runs only by name.

Records are written when an (N, K) has all its M, so a run that was cut leaves whole ones.
``--state FILE`` keeps which ones are done; the same command of the same source goes on with what is
left. ``--experiments``: also every Gluon candidate that ``kernels.gluon.choice`` does not hold for
much slower than its choice. One JSON line for each measurement; at the end what
``gemm_summary.py`` prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from gemm_summary import BASELINE, summary
from gemm_variants import BF16_MATMUL, MAX_COPIES, Problem, Weights, copies_for
from record import append, append_to, commit, need_gpu, record
from timing import copy_bandwidth, interleaved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemm_variants import Variant

# baseline/h200.md.
SHAPES = (
    "4096x7168,2112x7168,576x7168,24576x1536,32768x512,7168x16384,7168x2048,8192x3072,3072x6144"
)
TOKENS = "1,8,16,32,64,128,256,512,1024,2048,4096,8192"
PASSES = {
    "main": (
        ("gluon", ("float16", "bfloat16")),
        ("cuda", ("float16", "bfloat16")),
        ("deep_gemm", ("bfloat16",)),
        ("triton", ("float16",)),
    ),
    "rest": (
        ("deep_gemm", ("bfloat16",)),
        ("gluon", ("float32",)),
        ("cuda", ("float32",)),
        ("torch_scaled_mm", ("float16", "bfloat16", "float32")),
        ("triton", ("bfloat16", "float32")),
        (BF16_MATMUL, ("bfloat16",)),
    ),
    "peers": (
        ("deep_gemm", ("bfloat16",)),
        ("flashinfer_sm90", ("bfloat16",)),
    ),
}
# Only where it is named: FlashInfer compiles for half a minute a shape when it is first called.
BY_NAME = ("peers",)
# A square product that reaches the FP8 rate; on the pretend GPU, one that ends.
BIG, SMOKE_BIG = 8192, 256
SMOKE_COPIES = 2
COPY_MB, SMOKE_COPY_MB = 2048, 1
# The clocks are up after the first shape: graphs are only met once before they are timed.
WARM_UP_S = 0.04


def main() -> int:
    """Measure until everything is done or the time is up."""
    options = arguments()
    need_gpu()
    started = time.monotonic()
    ceilings = measure_ceilings(options)
    print(json.dumps(ceilings), flush=True)
    lines: list[dict[str, Any]] = []
    longest, left = 0.0, []
    rows = [row for row in rows_of(options) if row not in done(options.state)]
    for row in rows:
        elapsed = time.monotonic() - started
        if left or elapsed + longest > options.seconds:
            left.append(f"{row['pass']} {row['n']}x{row['k']}")
            continue
        found = measure_row(row, options, ceilings)
        for line in found:
            write(line, options)
        lines += found
        if options.state is not None:
            keep(options.state, row)
        longest = max(longest, time.monotonic() - started - elapsed)
    print(summary(lines))
    ended = f"{len(rows) - len(left)} rows in {time.monotonic() - started:.0f} s"
    print(f"{ended}; left: {', '.join(left) or 'nothing'}", flush=True)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pass", dest="passes", choices=[*PASSES, "all"], default="all")
    parser.add_argument("--shapes", default=SHAPES, help="NxK, separated by commas")
    parser.add_argument("--tokens", default=TOKENS)
    names = dict.fromkeys(name for one in PASSES.values() for name, _ in one)
    parser.add_argument("--backends", default=",".join(names), help="all but these are left out")
    parser.add_argument("--dtypes", default="float16,bfloat16,float32", help="outputs, likewise")
    parser.add_argument(
        "--seconds", type=float, default=300, help="no (N, K) starts that needs more"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--state", type=Path, help="which (N, K) are done: skipped and added to")
    parser.add_argument("--experiments", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="for the pretend GPU")
    parser.add_argument("--out", type=Path, help="JSON lines; --record writes benchmarks/results")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, in order; one says all that its records depend on."""
    backends, dtypes = options.backends.split(","), options.dtypes.split(",")
    for name, variants in PASSES.items():
        if options.passes != name and (options.passes != "all" or name in BY_NAME):
            continue
        wanted = [
            [backend, dtype]
            for backend, outputs in variants
            for dtype in outputs
            if backend in backends and (dtype in dtypes or backend in (BASELINE[0], BF16_MATMUL))
        ]
        if not [one for one in wanted if one != [*BASELINE]] and options.passes == "all":
            continue
        for shape in options.shapes.split(","):
            n, k = map(int, shape.split("x"))
            tokens = [*map(int, options.tokens.split(","))]
            row = {"pass": name, "n": n, "k": k, "tokens": tokens, "variants": wanted}
            yield {**row, "commit": commit()}


def done(state: Path | None) -> list[dict[str, Any]]:
    """The rows that were measured before."""
    if state is None or not state.is_file():
        return []
    return [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines()]


def keep(state: Path, row: dict[str, Any]) -> None:
    """Add a row to those."""
    state.parent.mkdir(parents=True, exist_ok=True)
    append_to(state, row)


def measure_ceilings(options: argparse.Namespace) -> dict[str, float]:
    """What the machine gives: copying, bfloat16 and tensor-wise FP8 products of 8192^3."""
    big = SMOKE_BIG if options.smoke else BIG
    a, b = (torch.randn(big, big, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device="cuda")

    def tensor_wise() -> object:
        return torch._scaled_mm(  # noqa: SLF001 - torch's only name for it
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    timings = interleaved({"bf16": lambda: a @ b.t(), "fp8": tensor_wise}, rounds=7, replays=3)
    copied = copy_bandwidth(SMOKE_COPY_MB if options.smoke else COPY_MB)
    flops = 2 * big**3
    rates = {
        "copy_gb_s": copied / 1e9,
        "bf16_tflops": flops / timings["bf16"].median_us / 1e6,
        "fp8_tensor_wise_tflops": flops / timings["fp8"].median_us / 1e6,
    }
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def measure_row(
    row: dict[str, Any], options: argparse.Namespace, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Records of one (N, K), all its M."""
    n, k, tokens = row["n"], row["k"], row["tokens"]
    most = SMOKE_COPIES if options.smoke else MAX_COPIES
    weights = Weights(n, k, copies_for(min(tokens), n, k, most))
    lines: list[dict[str, Any]] = []
    for m in tokens:
        problem = Problem(m, weights)
        timed = list(right_variants(problem, row["variants"], options))
        found = measure(problem, timed, options, ceilings)
        lines += [{**line, "pass": row["pass"]} for line in found]
        print_shape(m, n, k, found)
    del weights, problem, timed
    torch.cuda.empty_cache()
    return lines


def right_variants(
    problem: Problem, wanted: Sequence[Sequence[str]], options: argparse.Namespace
) -> Iterator[Variant]:
    """What runs on this machine and whose result is right; the others are printed."""
    for name, dtype in wanted:
        variant = problem.variant(name, DType(dtype))
        if variant is not None and problem.is_right(variant):
            yield variant
    if options.experiments:
        for dtype in dict.fromkeys(dtype for name, dtype in wanted if name == "gluon"):
            yield from filter(problem.is_right, problem.experiments(DType(dtype)))


def measure(
    problem: Problem,
    timed: Sequence[Variant],
    options: argparse.Namespace,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """Records of all variants on one shape."""
    timings = interleaved(
        {variant.name: variant.run for variant in timed},
        rounds=options.rounds,
        replays=2,
        warm_up_s=WARM_UP_S,
        warm_up_calls=1,
    )
    m, n, k = problem.m, problem.weights.n, problem.weights.k
    scale = 1 / problem.count
    baseline = next((v for v in timed if (v.backend, v.dtype.value) == BASELINE), None)
    deep_gemm_us = baseline and round(timings[baseline.name].median_us * scale, 3)
    lines = []
    for variant in timed:
        timing = timings[variant.name]
        us = timing.median_us * scale
        gb_s = ((m + n) * k + m * n * variant.dtype.bytes) / us / 1e3
        tflops = 2 * m * n * k / us / 1e6
        lines.append(
            record(
                "gemm",
                m=m,
                n=n,
                k=k,
                groups=None,
                backend=variant.backend,
                detail=variant.detail,
                planned=variant.is_planned,
                activation_dtype="float8_e4m3fn",
                out_dtype=variant.dtype.value,
                time_us=round(us, 3),
                p10_us=round(timing.p10_us * scale, 3),
                p90_us=round(timing.p90_us * scale, 3),
                deep_gemm_us=deep_gemm_us,
                tflops=round(tflops, 1),
                gb_s=round(gb_s, 1),
                share_of_copy=round(gb_s / ceilings["copy_gb_s"], 3),
                share_of_fp8=round(tflops / ceilings["fp8_tensor_wise_tflops"], 3),
                ceilings=ceilings,
                copies=problem.count,
                timing="cuda_graph",
            )
        )
    return lines


def write(line: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a record where the options say."""
    if options.record:
        append(line)
    if options.out:
        append_to(options.out, line)


def print_shape(m: int, n: int, k: int, lines: list[dict[str, Any]]) -> None:
    """One row a variant: time, spread, rate, share of the ceilings, ratio to DeepGEMM."""
    print(f"M={m} N={n} K={k}, {lines[0]['copies'] if lines else 0} copies")
    for line in lines:
        base = line["deep_gemm_us"]
        ratio = f"{base / line['time_us']:.2f}" if base else "-"
        print(
            f"  {line['backend']:16s} {line['out_dtype']:9s} {line['time_us']:9.2f} us "
            f"[{line['p10_us']:.2f}, {line['p90_us']:.2f}] {line['tflops']:7.0f} TF "
            f"{line['share_of_fp8']:4.0%} fp8 {line['share_of_copy']:4.0%} copy  x{ratio}  "
            f"{line['detail']}{' (planned)' if line['planned'] else ''}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
