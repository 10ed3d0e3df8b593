"""Times every candidate of the Gluon kernels on many shapes: what the model of costs is fitted to.

    python benchmarks/gluon_sweep.py --out FILE [--seconds 200] [--seed 0]

For random (M, N, K), N and K from real models (tests/data/shapes.csv), M from 1 to 8192, the
candidates that ``kernels.gluon.choice.promising`` gives are timed: CUDA graphs over weights rotated
beyond L2, candidates in turns. One JSON line for each (M, N, K): {"m", "n", "k", "times": {work:
us}}. Shapes are drawn until the time is up, so a short run is a smaller sample of the same thing.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.kernels.gluon.choice import promising, variants
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.reference import quantize, relayout
from blockscale.tensor import BlockScaledTensor
from record import machine, versions
from timing import replay_in_turns

SHAPES = Path(__file__).resolve().parent.parent / "tests" / "data" / "shapes.csv"
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
TOKENS += (1024, 1536, 2048, 3072, 4096, 8192)
ROTATION_BYTES = 130 << 20
MAX_COPIES = 24
MAX_WEIGHT_BYTES = 300 << 20
ROUNDS, REPLAYS = 5, 2
# TMA and the float16 epilogue want N and K in multiples of 16.
MULTIPLE = 16


def main() -> int:
    """Compile everything on all cores, then measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor() as pool:
        list(pool.map(compile_number, range(len(variants(2)))))
    print(f"compiled {len(variants(2))} forms in {time.monotonic() - started:.0f} s", flush=True)
    draw = random.Random(options.seed)  # noqa: S311 - a sample, not a secret
    shapes = real_shapes()
    count = 0
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}) + "\n")
        while time.monotonic() - started < options.seconds:
            n, k = draw.choice(shapes)
            products = [GluonProduct(weight) for weight in rotated_weights(n, k)]
            for m in draw.sample(TOKENS, 6):
                file.write(json.dumps({"m": m, "n": n, "k": k, "times": times(products, m)}) + "\n")
                count += 1
            file.flush()
    print(f"{count} shapes in {time.monotonic() - started:.0f} s")
    return 0


def compile_number(number: int) -> None:
    """Put one form into Triton's disk cache (in a process of the pool)."""
    from triton.backends.compiler import GPUTarget

    from blockscale.kernels.gluon.build import Form, compile_form

    compile_form(Form(variants(2)[number], torch.float16, overlap=True), GPUTarget("cuda", 90, 32))


def real_shapes() -> list[tuple[int, int]]:
    """Different (N, K) of real models at all tensor-parallel degrees."""
    with SHAPES.open(encoding="utf-8") as file:
        found = {(int(row["N"]), int(row["K"])) for row in csv.DictReader(file)}
    return sorted(
        (n, k)
        for n, k in found
        if n * k <= MAX_WEIGHT_BYTES and n % MULTIPLE == 0 and k % MULTIPLE == 0
    )


def rotated_weights(n: int, k: int) -> list[BlockScaledTensor]:
    """Copies of one weight, together larger than L2."""
    generator = torch.Generator(device="cuda").manual_seed(n * k)
    codes = torch.randn(n, k, generator=generator, device="cuda").mul_(30).to(torch.float8_e4m3fn)
    scales = torch.rand(FP8_128X128_FP32.block.grid(n, k), generator=generator, device="cuda")
    count = max(1, min(MAX_COPIES, ROTATION_BYTES // (n * k)))
    return [
        BlockScaledTensor(codes.clone(), scales, FP8_128X128_FP32, K_MAJOR) for _ in range(count)
    ]


def quantized_tokens(m: int, k: int) -> BlockScaledTensor:
    """Normal data as both kernels read it."""
    generator = torch.Generator(device="cuda").manual_seed(m)
    values = torch.randn(m, k, generator=generator, device="cuda")
    return relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)


def times(products: list[GluonProduct], m: int) -> dict[str, float]:
    """Microseconds of one product by candidate."""
    n, k = products[0]._n, products[0]._k  # noqa: SLF001 - a benchmark of this class
    activation = quantized_tokens(m, k)
    out = torch.empty((m, n), dtype=torch.float16, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    graphs = {}
    for work in promising(m, n, k, 2, processors):
        for product in products:
            product.use(work, m, torch.float16)
        products[0](activation, out, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for product in products:
                product(activation, out, None)
        graphs[work.name] = graph
    taken = replay_in_turns(graphs, ROUNDS, REPLAYS)
    return {name: round(statistics.median(t) / len(products), 3) for name, t in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
