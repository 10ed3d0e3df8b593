"""One token times one FP8 weight on this CPU: torch's compiled code and the C++ kernel by bf16.

    python benchmarks/cpu_matvec.py [--n 576] [--k 1536] [--rounds 2000]

Three ways to the same product take turns in one process, one thread each: torch's matrix product of
the bf16 weight, codes times scales times activation as ``torch.compile`` (inductor) fuses it, and
``kernels/cpu/block_fp8.cpp``. Results are compared first. Printed is how many times as long as the
bf16 product each takes: the median of paired ratios, with its 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from blockscale.formats import FP8_128X128_FP32
from blockscale.kernels.cpu.product import WeightOnlyProduct
from blockscale.reference import dequantize, quantize
from record import machine

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 50
TOLERANCE = 0.02
"""Relative: the bf16 weight and the results are rounded to bfloat16."""


def main() -> int:
    """Compare, measure, print; 1 if the ways disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=576)
    parser.add_argument("--k", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = products(options.n, options.k)
    results = {name: way().float() for name, way in ways.items()}
    for name, result in results.items():
        error = float((result - results["bf16"]).norm() / results["bf16"].norm())
        if error > TOLERANCE:
            print(f"{name} is off by {error:.3f}", file=sys.stderr)
            return 1
    seconds = measure(ways, options.rounds)
    print(f"{options.n}x{options.k}, one token, one thread; {machine()}, torch {torch.__version__}")
    for name in ways:
        ratios = [one / of for one, of in zip(seconds[name], seconds["bf16"], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10)
        print(f"{name:10} {statistics.median(ratios):5.2f} times bf16 ({low:.2f} to {high:.2f})")
    return 0


def products(n: int, k: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Three ways to multiply, ready."""
    weight = quantize(torch.randn(n, k) / k**0.5, FP8_128X128_FP32)
    codes, scales = weight.data, weight.scales
    wide, activation = dequantize(weight).bfloat16(), torch.randn(1, k).bfloat16()
    ours = WeightOnlyProduct(codes, scales, (128, 128))

    def fused(x: torch.Tensor, data: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        spread = steps.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return (data.float() * spread * x.float()).sum(1)[None].bfloat16()

    compiled = torch.compile(fused)

    def ours_once() -> torch.Tensor:
        out = activation.new_empty(1, n)
        ours(activation, out, None)
        return out

    return {
        "bf16": lambda: torch.nn.functional.linear(activation, wide),
        "inductor": lambda: compiled(activation, codes, scales),
        "C++": ours_once,
    }


def measure(ways: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(WARM_UP + rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
