"""Grouped block-FP8 GEMM on one GPU: backends and DeepGEMM in turns, checked before timing.

    python benchmarks/grouped.py [--cases contiguous,masked,minimax]
                                 [--backends gluon,cuda,deep_gemm]
                                 [--variants [cuda]] [--seconds 150] [--out FILE | --record]

DeepGEMM's own cases (its tests/generators.py): contiguous (groups, rows each) and masked (groups,
rows each, slots of 4096), counts drawn from 0.7 to 1.3 of the second; and MiniMax-M2.5's experts:
8 of 256 for each token, 4096 tokens contiguous, 1 to 128 masked, and those also in low row blocks,
which gluon alone reads (relative to DeepGEMM's masked time). Everything is compiled first, by
several processes. Copies that together are several times the L2 cache are
worked through by one CUDA graph each; graphs are replayed in turns. A result that is not near the
float64 product of the dequantized operands is reported and not timed. Activations are quantized.

``--variants``: also tiles that could serve, to see what the choice loses. Speeds are relative
to DeepGEMM on the same operands (bfloat16 output, the only one that it has); the summary at the end
is ``grouped_summary.py``'s.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale.backends.registry import runnable_backend_named
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    DType,
)
from blockscale.kernels.cuda.grouped_choice import ALIGNMENTS as CUDA_BLOCKS
from blockscale.kernels.cuda.grouped_choice import compared, contiguous_works, masked_works
from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct
from blockscale.kernels.gluon.grouped_choice import (
    choose_contiguous,
    choose_masked,
    contiguous_variants,
    masked_variants,
)
from blockscale.kernels.gluon.grouped_product import GroupedProduct
from blockscale.kernels.gluon.grouped_work import GroupedSmallVariant, grouped_small_variant
from blockscale.kernels.gluon.work import MAX_STAGES
from blockscale.planning.decision import Offer, OperandForm
from grouped_cases import (
    ALIGNMENT,
    Case,
    Copy,
    all_cases,
    empty_weight,
    make_copies,
    make_copy,
    wide_rows,
    wide_weight,
)
from grouped_summary import summary
from record import append, append_to, need_gpu, record
from timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blockscale.kernels.cuda.work import Work
    from blockscale.kernels.gluon.grouped_work import AnyGroupedVariant

    Outs = dict[tuple[str, int], torch.Tensor]

COMPILERS = 10
# Fewer rows than this are lost in a tile of 128.
LEAST_FOR_WIDE = 16
CHECKED_ROWS = 64
# Relative to the norm of the product.
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 2.5e-3}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OFFER = Offer(
    "bench",
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)


@dataclass(slots=True)
class Timed:
    """Something to time: one call for each copy, each with its result."""

    backend: str
    dtype: str
    detail: str
    is_chosen: bool
    calls: list[Callable[[], object]] = field(default_factory=list)
    outs: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Unique within a case."""
        return f"{self.backend} {self.dtype} {self.detail} {self.is_chosen}"

    def run(self) -> None:
        """All copies, one after the other."""
        for call in self.calls:
            call()


def main() -> int:
    """Compile, then measure until everything is done or the time is up."""
    options = arguments()
    families = options.cases.split(",")
    cases = [case for family in families for case in all_cases() if case.family == family]
    if options.compile:
        compile_case(next(case for case in cases if case.name == options.compile), options)
        return 0
    need_gpu()
    started = time.monotonic()
    compile_all(cases)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    lines: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() - started > options.seconds:
            print("out of time", flush=True)
            break
        try:
            lines += measure(case, options)
        except torch.cuda.OutOfMemoryError:
            print(f"{case.name}: out of memory", flush=True)
        torch.cuda.empty_cache()
    print(summary(lines), flush=True)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="minimax,masked,contiguous")
    parser.add_argument("--backends", default="gluon,cuda,deep_gemm")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="outputs, where one can")
    parser.add_argument(
        "--variants", nargs="?", const="gluon,cuda", default="", help="every tile of these backends"
    )
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON lines; --record writes benchmarks/results")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--compile", help="compile for this case and end: what main starts itself")
    return parser.parse_args()


def compile_all(cases: list[Case]) -> None:
    """One process for each case: DeepGEMM builds with nvcc and Gluon with ptxas, one at a time."""

    def build(case: Case) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--compile", case.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this file
        if done.returncode:
            print(f"compiling {case.name}: {done.stderr.strip()[-300:]}", flush=True)

    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
        list(pool.map(build, [case for case in cases if case.has_own_kernels]))


def compile_case(case: Case, options: argparse.Namespace) -> None:
    """Run everything once, on zeros and for no rows: only DeepGEMM's choice reads sizes."""
    copy = make_copy(case, 0, empty_weight(case), is_empty=True)
    for timed in everything(case, [copy], options):
        timed.run()
    torch.cuda.synchronize()


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one case; print, write and return what came of it."""
    copies = make_copies(case)
    right = [timed for timed in everything(case, copies, options) if is_right(timed, copies[0])]
    timings = interleaved({t.name: t.run for t in right}, rounds=options.rounds, replays=2)
    times = {name: timing.median_us / len(copies) for name, timing in timings.items()}
    base = next((times[t.name] for t in right if t.backend == "deep_gemm"), None)
    key = (case.tokens, case.n, case.k)
    if base and case.layout == "masked":
        masked_times[key] = base
    if case.alignment < ALIGNMENT:
        base = masked_times.get(key)
    rows, active = sum(copies[0].counts), sum(count > 0 for count in copies[0].counts)
    print(f"{case.name}: {rows} rows in {active} groups, {len(copies)} copies", flush=True)
    lines = []
    for timed in right:
        us, timing = times[timed.name], timings[timed.name]
        moved = active * case.n * case.k + rows * (case.k + 2 * case.n)
        tflops, gb_s = 2 * rows * case.n * case.k / us / 1e6, moved / us / 1e3
        ratio = base / us if base else math.nan
        mark = "*" if timed.is_chosen else " "
        print(
            f" {mark} {timed.backend:10s} {timed.dtype:9s} {us:9.2f} us {tflops:6.0f} TF "
            f"{gb_s:6.0f} GB/s  x{ratio:.3f}  {timed.detail}",
            flush=True,
        )
        line = record(
            "grouped",
            m=rows,
            n=case.n,
            k=case.k,
            groups=case.groups,
            layout=case.layout,
            case=case.name,
            active_groups=active,
            backend=timed.backend,
            detail=timed.detail,
            chosen=timed.is_chosen,
            activation_dtype="float8_e4m3fn",
            out_dtype=timed.dtype,
            time_us=round(us, 3),
            p10_us=round(timing.p10_us / len(copies), 3),
            p90_us=round(timing.p90_us / len(copies), 3),
            tflops=round(tflops, 1),
            gb_s=round(gb_s, 1),
            copies=len(copies),
            timing="cuda_graph",
        )
        write(line, options)
        lines.append(line)
    return lines


def write(line: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a record where the options say."""
    if options.record:
        append(line)
    if options.out:
        append_to(options.out, line)


# DeepGEMM's masked times by (tokens, n, k): what low row blocks are compared with.
masked_times: dict[tuple[int, int, int], float] = {}


def everything(case: Case, copies: list[Copy], options: argparse.Namespace) -> Iterator[Timed]:
    """All that the options ask for and this machine can run, ready to call."""
    outs: Outs = {}
    for name in options.backends.split(","):
        if not is_for(name, case):
            continue
        dtypes = ["bfloat16"] if name == "deep_gemm" else options.dtypes.split(",")
        for dtype in dtypes:
            timed = Timed(name, dtype, chosen(name, case, copies[0], dtype), is_chosen=True)
            try:
                bind(timed, case, copies, outs)
                timed.calls[0]()
            except (BlockscaleError, ImportError, RuntimeError, AssertionError) as error:
                print(f"{name} {dtype}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            yield timed
    if options.variants:
        for name, variant in tried(case, copies[0], options.variants.split(",")):
            timed = Timed(name, "bfloat16", variant.name, is_chosen=False)
            bind(timed, case, copies, outs, variant)
            yield timed


def is_for(backend: str, case: Case) -> bool:
    """Whether the backend has row blocks of so many rows."""
    return case.alignment in {"cuda": CUDA_BLOCKS, "deep_gemm": (ALIGNMENT,)}.get(
        backend, (case.alignment,)
    )


def chosen(backend: str, case: Case, copy: Copy, dtype: str) -> str:
    """The tile that the backend takes; gluon the same one in both output dtypes."""
    blocks = copy.routing.numel()
    if backend == "cuda":
        product, rows = CudaGroupedProduct(copy.weight), copy.activation.data.shape[-2]
        if case.layout == "masked":
            return product.masked_work(rows, case.likely, DTYPES[dtype]).name
        return product.contiguous_work(rows, blocks, DTYPES[dtype]).name
    if backend != "gluon":
        return ""
    if case.layout == "masked":
        return choose_masked(case.groups, case.slot, case.likely, 2).name
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return choose_contiguous(case.groups, blocks, case.alignment, case.n, 2, processors).name


def tried(
    case: Case, copy: Copy, backends: list[str]
) -> Iterator[tuple[str, AnyGroupedVariant | Work]]:
    """Tiles that are not hopeless, by backend."""
    if "gluon" in backends:
        yield from (("gluon", variant) for variant in tried_of_gluon(case))
    if "cuda" in backends and is_for("cuda", case):
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        given = (case.n, case.k), DType.BFLOAT16, processors
        if case.layout == "masked":
            works = masked_works((case.groups, case.slot, case.likely), *given)
        else:
            works = contiguous_works((case.groups, copy.routing.numel(), case.alignment), *given)
        yield from (("cuda", work) for work in compared(works))


def tried_of_gluon(case: Case) -> Iterator[AnyGroupedVariant]:
    """For few rows also one program a multiprocessor, longer rings."""
    if case.layout == "contiguous":
        found = contiguous_variants(case.alignment, 2)
    else:
        found = masked_variants(case.groups, 2)
    for variant in found:
        if not isinstance(variant, GroupedSmallVariant):
            if case.layout == "contiguous" or case.likely >= LEAST_FOR_WIDE:
                yield variant
            continue
        if case.layout == "masked" and not is_sensible(variant.tokens, case.likely):
            continue
        yield variant
        yield grouped_small_variant(variant.weights, variant.tokens, 2, variant.groups, beside=1)
        if variant.stages >= MAX_STAGES:
            yield replace(variant, stages=variant.stages + variant.stages // 4)


def is_sensible(tokens: int, likely: int) -> bool:
    """Whether a tile of so many tokens is neither far too low nor far too high for a group."""
    return likely <= 4 * tokens and tokens <= 8 * likely


def bind(
    timed: Timed,
    case: Case,
    copies: list[Copy],
    outs: Outs,
    variant: AnyGroupedVariant | Work | None = None,
) -> None:
    """Fill in the calls; all of one dtype share the results' memory."""
    for copy in copies:
        key = (timed.dtype, id(copy))
        if key not in outs:
            shape = (*copy.activation.data.shape[:-1], case.n)
            outs[key] = torch.empty(shape, dtype=DTYPES[timed.dtype], device="cuda")
        timed.outs.append(outs[key])
        timed.calls.append(call(timed.backend, case, copy, outs[key], variant))


def call(
    backend: str,
    case: Case,
    copy: Copy,
    out: torch.Tensor,
    variant: AnyGroupedVariant | Work | None,
) -> Callable[[], object]:
    """One launch."""
    if backend == "deep_gemm":
        return deep_gemm_call(case, copy, out)
    if backend == "cuda":
        of_cuda = CudaGroupedProduct(copy.weight)
        of_cuda.use(variant)
        contiguous, masked = of_cuda.contiguous, of_cuda.masked
    elif backend == "gluon":
        product = GroupedProduct(copy.weight)
        product.use(variant)
        contiguous, masked = product.contiguous, product.masked
    else:
        runnable: Any = runnable_backend_named(backend)
        contiguous = runnable.bind_contiguous(copy.weight, OFFER)
        masked = runnable.bind_masked(copy.weight, OFFER)
    if case.layout == "masked":
        return partial(masked, copy.activation, copy.routing, out, case.likely)
    return partial(contiguous, copy.activation, copy.routing, out)


def deep_gemm_call(case: Case, copy: Copy, out: torch.Tensor) -> Callable[[], object]:
    """Itself, without the backend's kernel that says each row's expert."""
    import deep_gemm

    activation = (copy.activation.data, copy.activation.scales)
    weight = (copy.weight.data, copy.weight.scales)
    if case.layout == "masked":
        masked = deep_gemm.fp8_m_grouped_gemm_nt_masked
        return partial(masked, activation, weight, out, copy.routing, case.likely)
    of_rows = copy.routing.repeat_interleave(case.alignment)
    return partial(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, activation, weight, out, of_rows)


def is_right(timed: Timed, copy: Copy) -> bool:
    """Whether the first, the largest and the last group's first rows are near the product."""
    out = timed.outs[0].view(-1, copy.weight.mn)
    out.fill_(math.nan)
    timed.calls[0]()
    busy = [group for group, count in enumerate(copy.counts) if count]
    largest = max(busy, key=copy.counts.__getitem__)
    codes = copy.activation.data.view(-1, copy.weight.k)
    for group in sorted({busy[0], largest, busy[-1]}):
        start, count = copy.starts[group], copy.counts[group]
        rows = slice(max(start, start + count - CHECKED_ROWS), start + count)
        expected = wide_rows(copy, group, rows, codes) @ wide_weight(copy, group).T
        error = (out[rows].double() - expected).norm() / expected.norm()
        if not error <= LIMITS[DTYPES[timed.dtype]]:
            print(f"WRONG {timed.name}: group {group}, relative error {error:.2e}", flush=True)
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
