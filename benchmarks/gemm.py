"""Dense block-FP8 GEMM on one GPU: every backend in turns, checked before it is timed.

    python benchmarks/gemm.py [--shapes 4096x7168,...] [--tokens 1,8,...] [--seconds 300]
                              [--backends gluon,deep_gemm,...] [--dtypes float16,bfloat16]
                              [--experiments] [--out FILE | --record]

For each (N, K) and M: backends that can run the shape, and a bfloat16 product of the same shape.
Weights, activations and results rotate over copies that together are several times the L2 cache;
one CUDA graph goes through all copies; graphs are replayed in turns. A result that is not near the
float64 product of the dequantized operands is reported and not timed. Activations are quantized
already: quantizing is not part of any backend's time. The reduction of a split sum is.

``--experiments``: also every Gluon candidate that ``kernels.gluon.choice`` does not hold for much
slower than its choice. One JSON line for each measurement; a table of ratios to DeepGEMM, by range
of M, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    MN_MAJOR_TMA_ALIGNED,
    DType,
)
from blockscale.kernels.cuda.product import CudaProduct
from blockscale.kernels.gluon.choice import promising
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.planning.decision import Offer
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import dequantize, quantize, relayout
from blockscale.tensor import torch_dtype
from record import append, need_gpu, record
from timing import copy_bandwidth, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blockscale.formats import ScaleLayout
    from blockscale.tensor import BlockScaledTensor

# baseline/h200.md.
SHAPES = (
    "4096x7168,2112x7168,576x7168,24576x1536,32768x512,7168x16384,7168x2048,8192x3072,3072x6144"
)
TOKENS = "1,8,16,32,64,128,256,512,1024,2048,4096,8192"
NAMES = "gluon,cuda,deep_gemm,torch_scaled_mm,triton,bf16_matmul"
RANGES = ((1, 16), (32, 64), (128, 512), (1024, 8192))
ROTATED_BYTES = 200 << 20
MAX_COPIES = 32
# Rows that are compared with float64: the first and the last.
CHECKED_ROWS = 256
# Relative to the norm of the product (facts/kernels.md 8); bf16_matmul rounds its operands.
LIMITS = {DType.FLOAT32: 3e-4, DType.FLOAT16: 5e-4, DType.BFLOAT16: 2.5e-3}
BF16_OPERANDS_LIMIT = 1e-2
BIG = 8192


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to time. ``calls``: one for each copy, writing into ``outs``."""

    backend: str
    dtype: DType
    calls: list[Callable[[], object]]
    outs: list[torch.Tensor]
    detail: str = ""

    @property
    def name(self) -> str:
        """Unique within a shape."""
        return f"{self.backend} {self.dtype.value} {self.detail}".strip()

    def run(self) -> None:
        """All copies, one after the other."""
        for call in self.calls:
            call()


@dataclass(frozen=True, slots=True)
class Copy:
    """One set of operands."""

    activation: BlockScaledTensor
    weight: BlockScaledTensor


def main() -> int:
    """Measure until everything is done or the time is up."""
    options = arguments()
    need_gpu()
    started = time.monotonic()
    ceilings = measure_ceilings()
    print(json.dumps(ceilings), flush=True)
    ratios: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, options.tokens.split(",")):
            if time.monotonic() - started > options.seconds:
                print("out of time", flush=True)
                break
            lines = measure(m, n, k, options, ceilings)
            for line in lines:
                write(line, options)
            collect(lines, ratios)
            torch.cuda.empty_cache()
    print_ratios(ratios)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="NxK, separated by commas")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--backends", default=NAMES)
    parser.add_argument("--dtypes", default="float16,bfloat16", help="outputs, where a backend can")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--experiments", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON lines; --record writes benchmarks/results")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def measure_ceilings() -> dict[str, float]:
    """What the machine gives: copying, bfloat16 and tensor-wise FP8 products of 8192^3."""
    a, b = (torch.randn(BIG, BIG, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device="cuda")

    def tensor_wise() -> object:
        return torch._scaled_mm(  # noqa: SLF001 - torch's only name for it
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    timings = interleaved({"bf16": lambda: a @ b.t(), "fp8": tensor_wise}, rounds=7, replays=3)
    flops = 2 * BIG**3
    return {
        "copy_gb_s": round(copy_bandwidth() / 1e9),
        "bf16_tflops": round(flops / timings["bf16"].median_us / 1e6),
        "fp8_tensor_wise_tflops": round(flops / timings["fp8"].median_us / 1e6),
    }


def measure(
    m: int, n: int, k: int, options: argparse.Namespace, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Records of all variants on one shape; wrong ones are printed and left out."""
    copies = make_copies(m, n, k)
    right = [v for v in variants(copies, options) if is_right(v, copies[0])]
    timings = interleaved({v.name: v.run for v in right}, rounds=options.rounds, replays=2)
    moved = n * k + m * k
    lines = []
    for variant in right:
        timing = timings[variant.name]
        scale = 1 / len(copies)
        us = timing.median_us * scale
        gb_s = (moved + m * n * variant.dtype.bytes) / us / 1e3
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
                activation_dtype="float8_e4m3fn",
                out_dtype=variant.dtype.value,
                time_us=round(us, 3),
                p10_us=round(timing.p10_us * scale, 3),
                p90_us=round(timing.p90_us * scale, 3),
                tflops=round(tflops, 1),
                gb_s=round(gb_s, 1),
                share_of_copy=round(gb_s / ceilings["copy_gb_s"], 3),
                share_of_fp8=round(tflops / ceilings["fp8_tensor_wise_tflops"], 3),
                ceilings=ceilings,
                copies=len(copies),
                timing="cuda_graph",
            )
        )
    print_shape(m, n, k, lines)
    return lines


def make_copies(m: int, n: int, k: int) -> list[Copy]:
    """Different operands, together several times the L2 cache."""
    count = max(2, min(MAX_COPIES, math.ceil(ROTATED_BYTES / (n * k + m * k + 2 * m * n))))
    generator = torch.Generator(device="cuda").manual_seed(m + n + k)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, generator=generator, device="cuda")

    return [
        Copy(quantize(normal(m), FP8_1X128_FP32), quantize(normal(n), FP8_128X128_FP32))
        for _ in range(count)
    ]


def variants(copies: list[Copy], options: argparse.Namespace) -> Iterator[Variant]:
    """What the options ask for and this machine can run."""
    dtypes = [DType(name) for name in options.dtypes.split(",")]
    for name in options.backends.split(","):
        if name == "bf16_matmul":
            yield bf16_matmul(copies)
            continue
        for dtype in dtypes:
            found = backend_variant(name, copies, dtype)
            if found is not None:
                yield found
    if options.experiments:
        for dtype in dtypes:
            yield from experiments(copies, dtype)


def backend_variant(name: str, copies: list[Copy], dtype: DType) -> Variant | None:
    """A backend's own call on prepared operands; None if it cannot, with its words printed."""
    n, k = copies[0].weight.data.shape
    request = LinearRequest("bench", n, k, FP8_128X128_FP32, dtype, dtype)
    planned = next(backend for backend in BACKENDS if backend.name == name)
    offer = planned.evaluate(request, detect_device())
    if not isinstance(offer, Offer) or offer.activation is None:
        return None
    layout = offer.activation.layout
    try:
        backend = runnable_backend_named(name)
        bound = [backend.bind(relayout(copy.weight, offer.weight.layout), offer) for copy in copies]
        detail = ""
        if isinstance(bound[0], (GluonProduct, CudaProduct)):
            detail = bound[0].work(copies[0].activation.mn, torch_dtype(dtype)).name
        variant = bound_variant(Variant(name, dtype, [], [], detail), bound, copies, layout)
        variant.calls[0]()
    except (BlockscaleError, ImportError, RuntimeError) as error:
        print(f"{name} {dtype.value}: {' '.join(str(error).split())[:200]}", flush=True)
        return None
    return variant


def bound_variant(
    variant: Variant, bound: list[Any], copies: list[Copy], layout: ScaleLayout
) -> Variant:
    """``variant`` with the calls of products that are bound to the copies' weights."""
    for multiply, copy in zip(bound, copies, strict=True):
        activation = relayout(copy.activation, layout)
        shape = (activation.mn, copy.weight.mn)
        out = torch.full(shape, float("nan"), device="cuda").to(torch_dtype(variant.dtype))
        variant.outs.append(out)
        variant.calls.append(partial(multiply, activation, out, None))
    return variant


def bf16_matmul(copies: list[Copy]) -> Variant:
    """The same product of bfloat16 operands."""
    variant = Variant("bf16_matmul", DType.BFLOAT16, [], [])
    for copy in copies:
        a, b = (dequantize(x).to(torch.bfloat16) for x in (copy.activation, copy.weight))
        out = torch.full((a.shape[0], b.shape[0]), float("nan"), device="cuda").to(torch.bfloat16)
        variant.outs.append(out)
        variant.calls.append(partial(torch.mm, a, b.t(), out=out))
    return variant


def experiments(copies: list[Copy], dtype: DType) -> Iterator[Variant]:
    """What the model chose from."""
    activation, out_dtype = copies[0].activation, torch_dtype(dtype)
    m, (n, k) = activation.mn, copies[0].weight.data.shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for work in promising(m, n, k, dtype.bytes, processors):
        bound = [GluonProduct(copy.weight) for copy in copies]
        for product in bound:
            product.use(work, m, out_dtype)
        empty = Variant("gluon", dtype, [], [], f"candidate: {work.name}")
        yield bound_variant(empty, bound, copies, MN_MAJOR_TMA_ALIGNED)


def is_right(variant: Variant, copy: Copy) -> bool:
    """Whether the first copy's result is near the float64 product, in its first and last rows."""
    variant.calls[0]()
    m = copy.activation.mn
    rows = sorted({*range(min(m, CHECKED_ROWS)), *range(max(0, m - CHECKED_ROWS), m)})
    expected = dequantize(copy.activation)[rows].double() @ dequantize(copy.weight).double().T
    error = (variant.outs[0][rows].double() - expected).norm() / expected.norm()
    limit = BF16_OPERANDS_LIMIT if variant.backend == "bf16_matmul" else LIMITS[variant.dtype]
    if not error <= limit:
        print(f"WRONG {variant.name}: relative error {error:.2e}, not timed", flush=True)
        return False
    return True


def write(line: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a record where the options say."""
    if options.record:
        append(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def print_shape(m: int, n: int, k: int, lines: list[dict[str, Any]]) -> None:
    """One row a variant: time, spread, rate, share of the ceilings, ratio to DeepGEMM."""
    base = reference_time(lines)
    print(f"M={m} N={n} K={k}, {lines[0]['copies'] if lines else 0} copies")
    for line in lines:
        ratio = f"{base / line['time_us']:.2f}" if base else "-"
        print(
            f"  {line['backend']:16s} {line['out_dtype']:9s} {line['time_us']:9.2f} us "
            f"[{line['p10_us']:.2f}, {line['p90_us']:.2f}] {line['tflops']:7.0f} TF "
            f"{line['share_of_fp8']:4.0%} fp8 {line['share_of_copy']:4.0%} copy  x{ratio}  "
            f"{line['detail']}",
            flush=True,
        )


def reference_time(lines: list[dict[str, Any]]) -> float | None:
    """DeepGEMM's time on this shape, None where it did not run."""
    return next((x["time_us"] for x in lines if x["backend"] == "deep_gemm"), None)


def collect(
    lines: list[dict[str, Any]], ratios: dict[tuple[str, tuple[int, int]], list[float]]
) -> None:
    """Add this shape's ratios to DeepGEMM by backend, dtype, experiment and range of M."""
    base = reference_time(lines)
    if base is None:
        return
    for line in lines:
        experiment = line["detail"].partition(":")[0] if ":" in line["detail"] else ""
        name = f"{line['backend']} {line['out_dtype']} {experiment}".strip()
        where = next((r for r in RANGES if r[0] <= line["m"] <= r[1]), None)
        if where is not None:
            ratios[name, where].append(base / line["time_us"])


def print_ratios(ratios: dict[tuple[str, tuple[int, int]], list[float]]) -> None:
    """Geometric mean (worst) of the speed relative to DeepGEMM."""
    print("speed relative to deep_gemm bfloat16: geometric mean (worst) of N shapes")
    for name in dict.fromkeys(name for name, _ in ratios):
        cells = []
        for where in RANGES:
            found = ratios.get((name, where))
            text = f"{geometric_mean(found):.2f} ({min(found):.2f}) {len(found)}" if found else "-"
            cells.append(f"M {where[0]}-{where[1]}: {text}")
        print(f"  {name:34s} " + "  ".join(cells))


if __name__ == "__main__":
    sys.exit(main())
