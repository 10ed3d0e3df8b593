"""Times every candidate of the Gluon kernels on many shapes: what the choice is fitted to.

    python benchmarks/gluon_sweep.py --out FILE [--after SWEEP...] [--seconds 200] [--seed 0]

For random (M, N, K), N and K from real models (tests/data/shapes.csv), M from 1 to 8192, the
candidates that ``kernels.gluon.choice.promising`` gives are timed: CUDA graphs over weights rotated
beyond L2, candidates in turns. One JSON line for each (M, N, K): {"m", "n", "k", "times": {work:
us}}. Shapes are drawn until the time is up, so a short run is a smaller sample of the same thing.

``--after``: shapes of which most is to be learnt, given what these sweeps know, come first: those
where the choice is a candidate that was never timed (least certain first); then the (N, K) of
``gemm.py`` at M of 17 to 512; then M of 17 to 512 at random. Candidates within 1.35 of the choice
only, so that there are more shapes.
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
from typing import TYPE_CHECKING

import torch

from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.kernels.gluon.choice import FAR, candidates, choose, promising, variants
from blockscale.kernels.gluon.corrections import clocks
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.reference import quantize, relayout
from blockscale.tensor import BlockScaledTensor
from record import machine, versions
from timing import replay_in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = Path(__file__).resolve().parent.parent / "tests" / "data" / "shapes.csv"
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
TOKENS += (1024, 1536, 2048, 3072, 4096, 8192)
ROTATION_BYTES = 130 << 20
MAX_COPIES = 24
MAX_WEIGHT_BYTES = 300 << 20
ROUNDS, REPLAYS = 5, 2
# TMA and the float16 epilogue want N and K in multiples of 16.
MULTIPLE = 16
# With ``--after``: M and candidates.
MIDDLE_TOKENS = tuple(m for m in TOKENS if m in range(17, 513))
NEARER = 1.35
PROCESSORS = 132
# ``gemm.py``'s.
BASELINE = ((4096, 7168), (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384))
BASELINE += ((7168, 2048), (8192, 3072), (3072, 6144))


def main() -> int:
    """Compile everything on all cores, then measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor() as pool:
        list(pool.map(compile_number, range(len(variants(2)))))
    print(f"compiled {len(variants(2))} forms in {time.monotonic() - started:.0f} s", flush=True)
    draw = random.Random(options.seed)  # noqa: S311 - a sample, not a secret
    count = 0
    far = NEARER if options.after else FAR
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}) + "\n")
        for (n, k), tokens in order(options.after, draw):
            if time.monotonic() - started > options.seconds:
                break
            products = [GluonProduct(weight) for weight in rotated_weights(n, k)]
            for m in tokens:
                line = {"m": m, "n": n, "k": k, "times": times(products, m, far)}
                file.write(json.dumps(line) + "\n")
                count += 1
            file.flush()
    print(f"{count} shapes in {time.monotonic() - started:.0f} s")
    return 0


def order(known: list[Path], draw: random.Random) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """(N, K) and their M, for ever."""
    if known:
        yield from untimed(known)
        for shape in BASELINE:
            yield shape, list(MIDDLE_TOKENS)
    shapes = real_shapes()
    while True:
        yield draw.choice(shapes), draw.sample(MIDDLE_TOKENS if known else TOKENS, 6)


def untimed(known: list[Path]) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Shapes of sweeps whose choice was not timed, most doubtful (N, K) first.

    The doubt: how much faster than the fastest that was timed the choice is taken for.
    """
    doubts: dict[tuple[int, int], dict[int, float]] = {}
    for line in (json.loads(x) for path in known for x in path.read_text("utf-8").splitlines()):
        if "times" not in line:
            continue
        m, n, k = line["m"], line["n"], line["k"]
        timed = [w for w in candidates(m, n, k, 2, PROCESSORS) if w.name in line["times"]]
        chosen = choose(m, n, k, 2, PROCESSORS)
        if chosen not in timed:
            best = min(clocks(work, m, n, 2, PROCESSORS) for work in timed)
            doubts.setdefault((n, k), {})[m] = best / clocks(chosen, m, n, 2, PROCESSORS)
    for shape in sorted(doubts, key=lambda s: max(doubts[s].values()), reverse=True):
        yield shape, sorted(doubts[shape])


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


def times(products: list[GluonProduct], m: int, far: float) -> dict[str, float]:
    """Microseconds of one product by candidate."""
    n, k = products[0]._n, products[0]._k  # noqa: SLF001 - a benchmark of this class
    activation = quantized_tokens(m, k)
    out = torch.empty((m, n), dtype=torch.float16, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    graphs = {}
    for work in promising(m, n, k, 2, processors, far):
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
