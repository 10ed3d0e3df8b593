"""Times the forms of gemm.cu on many shapes, beside Gluon's choice: what its model is fitted to.

    python benchmarks/cuda_sweep.py --out FILE [--seconds 200] [--shapes 4096x7168,...]
                                    [--tokens 128,...] [--most 16] [--far 1.6]
                                    [--random --seed 0 --random-tokens 8,12,...]
                                    [--written | --ways] [--out-dtype float32]

For each (N, K) and M the candidates that the model of ``kernels.cuda.choice`` holds for at most
``--far`` times as slow as its best, at most ``--most``, and what ``kernels.gluon.choice`` chooses:
CUDA graphs over weights rotated beyond L2, candidates in turns. One JSON line for each (M, N, K),
as ``gluon_sweep.py`` writes them: {"m", "n", "k", "out_dtype", "times": {work: us}, "clocks":
{work: the model's}}. At the end how the model's choice compares with the fastest, and the fastest
with Gluon. ``--random``: then (N, K) of real models with six M each, until the time is up;
``--random-tokens``: of these.
``--written``: the same tiles, each written as if it were chosen (``writing.written``).
``--ways``: each in all ways that that was chosen from; at the end ``cuda_ways.py``'s summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from blockscale.kernels.cuda.build import compile_all
from blockscale.kernels.cuda.choice import candidates, forms
from blockscale.kernels.cuda.corrections import clocks
from blockscale.kernels.cuda.product import CudaProduct
from blockscale.kernels.cuda.work import When
from blockscale.kernels.cuda.writing import (
    at_once,
    by_lanes,
    in_flight,
    late,
    ways_to_write,
    written,
)
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.tensor import torch_dtype
from cuda_ways import print_ways
from gluon_sweep import TOKENS as EVERY_M
from gluon_sweep import quantized_tokens, real_shapes, rotated_weights
from record import machine, versions
from timing import replay_in_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blockscale.kernels.cuda.work import Work

# baseline/h200.md; the ranges of M where the Gluon kernel is behind DeepGEMM come first.
SHAPES = (
    "4096x7168,2112x7168,576x7168,24576x1536,32768x512,7168x16384,7168x2048,8192x3072,3072x6144"
)
TOKENS = "256,1024,128,4096,512,2048,64,8192,32,16"
RANDOM_TOKENS = tuple(m for m in EVERY_M if m >= 8)
WARM_UP_ROUNDS, ROUNDS, REPLAYS = 2, 7, 3
OUT_DTYPES = ("float16", "bfloat16", "float32")


def main() -> int:
    """Compile everything on all cores, then measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--most", type=int, default=16, help="candidates of one shape")
    parser.add_argument("--far", type=float, default=1.6, help="no candidates beyond this")
    parser.add_argument("--random", action="store_true", help="go on with shapes of real models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-tokens", default=",".join(map(str, RANDOM_TOKENS)))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--written", action="store_true", help="written as what is chosen is")
    how.add_argument("--ways", action="store_true", help="written in boxes and by lanes")
    parser.add_argument("--out-dtype", choices=OUT_DTYPES, default="float16")
    options = parser.parse_args()
    drawn_from = [int(m) for m in options.random_tokens.split(",")]
    started = time.monotonic()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    points = [(int(m), n, k) for m in options.tokens.split(",") for n, k in shapes]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    out = DType(options.out_dtype)
    every = set(forms(out))
    if options.written or options.ways:
        boxes = [way(form) for form in every for way in (at_once, late)]
        lanes = [by_lanes(form, when) for form in every for when in When]
        every = {way for form in (*boxes, *lanes) for way in (form, in_flight(form))}
    compile_all(every, os.cpu_count() or 1)
    print(f"compiled {len(every)} forms in {time.monotonic() - started:.0f} s", flush=True)
    lines = []
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}) + "\n")
        for m, n, k in chain(points, drawn(options.seed, drawn_from) if options.random else ()):
            if time.monotonic() - started > options.seconds:
                print("out of time", flush=True)
                break
            works = near((m, n, k), out, processors, options.far)[: options.most]
            if options.written:
                works = list(dict.fromkeys(written(work) for work in works))
            if options.ways:
                works = list(dict.fromkeys(way for work in works for way in ways_to_write(work)))
            lines.append(measure((m, n, k), out, works))
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            print_line(lines[-1])
    if options.ways:
        print_ways(lines)
    else:
        print_summary(lines)
    return 0


def near(shape: tuple[int, int, int], out: DType, processors: int, far: float) -> list[Work]:
    """Candidates, the model's best first, none that it holds for ``far`` times as slow."""
    m, n, _k = shape
    found = sorted(
        candidates(*shape, out, processors), key=lambda work: clocks(work, m, n, processors)
    )
    limit = far * clocks(found[0], m, n, processors)
    return [work for work in found if clocks(work, m, n, processors) <= limit]


def drawn(seed: int, tokens: list[int]) -> Iterator[tuple[int, int, int]]:
    """(M, N, K) at random, for ever: N and K from real models, six M or all of fewer."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    shapes = real_shapes()
    while True:
        n, k = draw.choice(shapes)
        yield from ((m, n, k) for m in draw.sample(tokens, min(6, len(tokens))))


def measure(shape: tuple[int, int, int], out: DType, candidates: list[Work]) -> dict[str, Any]:
    """Microseconds of one product by candidate; Gluon's under its own name."""
    m, n, k = shape
    dtype = torch_dtype(out)
    weights = rotated_weights(n, k)
    activation = quantized_tokens(m, k)
    results = torch.empty((m, n), dtype=dtype, device="cuda")
    graphs = {}
    products = [CudaProduct(weight) for weight in weights]
    for work in candidates:
        for product in products:
            product.use(work, m, dtype)
        graphs[work.name] = captured(products, activation, results)
    gluon = [GluonProduct(weight) for weight in weights]
    graphs[f"gluon {gluon[0].work(m, dtype).name}"] = captured(gluon, activation, results)
    # Right after M = 2048 what M = 64 takes was up to 30 % too long without (H100, 2026-11-26).
    replay_in_turns(graphs, WARM_UP_ROUNDS, REPLAYS)
    taken = replay_in_turns(graphs, ROUNDS, REPLAYS)
    times = {name: round(statistics.median(t) / len(weights), 3) for name, t in taken.items()}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    model = {work.name: round(clocks(work, m, n, processors)) for work in candidates}
    return {"m": m, "n": n, "k": k, "out_dtype": out.value, "times": times, "clocks": model}


def captured(
    products: list[Callable[..., None]], activation: object, out: torch.Tensor
) -> torch.cuda.CUDAGraph:
    """All products in one graph, each run once before."""
    for product in products:
        product(activation, out, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(activation, out, None)
    return graph


def best(line: dict[str, Any]) -> tuple[str, float]:
    """The fastest form of gemm.cu."""
    own = {name: us for name, us in line["times"].items() if not name.startswith("gluon")}
    name = min(own, key=own.__getitem__)
    return name, own[name]


def gluon_time(line: dict[str, Any]) -> float:
    """Of Gluon's choice."""
    found: float = next(us for name, us in line["times"].items() if name.startswith("gluon"))
    return found


def chosen(line: dict[str, Any]) -> str:
    """What the model takes."""
    name: str = min(line["clocks"], key=line["clocks"].__getitem__)
    return name


def print_line(line: dict[str, Any]) -> None:
    """The fastest, the model's choice, and both against Gluon."""
    name, us = best(line)
    choice = chosen(line)
    tflops = 2 * line["m"] * line["n"] * line["k"] / us / 1e6
    print(
        f"M={line['m']} N={line['n']} K={line['k']}: {name} {us:.2f} us {tflops:.0f} TF, "
        f"chosen {choice} {line['times'][choice]:.2f}, gluon {gluon_time(line):.2f} "
        f"(x{gluon_time(line) / us:.3f})",
        flush=True,
    )


def print_summary(lines: list[dict[str, Any]]) -> None:
    """By M: speed of the fastest and of the chosen form relative to Gluon's choice."""
    for m in dict.fromkeys(line["m"] for line in lines):
        of_m = [line for line in lines if line["m"] == m]
        fastest = geometric_mean([gluon_time(line) / best(line)[1] for line in of_m])
        taken = geometric_mean([gluon_time(line) / line["times"][chosen(line)] for line in of_m])
        print(f"M={m}: fastest x{fastest:.3f}, chosen x{taken:.3f} of gluon, {len(of_m)} shapes")


if __name__ == "__main__":
    sys.exit(main())
