"""Host time of one planned layer, beside calling its two kernels directly.

    python benchmarks/call_overhead.py [--out FILE]

Times are of the calling thread: calls are enqueued without waiting, on a layer so small that the
GPU keeps up. "direct": quantizer and product with everything looked up and the result allocated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import read_machine
from blockscale.reference import quantize
from record import record

if TYPE_CHECKING:
    from collections.abc import Callable

N, K, M = 256, 256, 4
CALLS, ROUNDS = 500, 15
NAMES = ("triton", "gluon", "cuda", "deep_gemm", "torch_scaled_mm")


def main() -> int:
    """Measure every backend that runs here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [line for name in NAMES if (line := overhead(name)) is not None]
    lines = [json.dumps(record("call_overhead", **line)) for line in found]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("".join(line + "\n" for line in lines))
    return 0


def overhead(name: str) -> dict[str, object] | None:
    """Host microseconds of a forward and of its parts; None if the backend cannot run here."""
    dtype = DType.BFLOAT16
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, dtype, dtype)
    plan = plan_linear(request, read_machine(), PlanPolicy(backends=(name,)), BACKENDS)
    if not plan.is_servable:
        return None
    weight = quantize(torch.randn(N, K), FP8_128X128_FP32).to("cuda")
    layer = BlockScaledLinear(plan, weight)
    backend, offer = runnable_backend_named(name), plan.choices[0].offer
    multiply = backend.bind(layer.weight, offer)
    x = torch.randn(M, K, device="cuda").to(torch.bfloat16)
    out = torch.empty((M, N), dtype=torch.bfloat16, device="cuda")
    quantized = backend.quantize_activation(x, offer)
    times = {
        "layer_us": lambda: layer(x),
        "quantize_us": lambda: backend.quantize_activation(x, offer),
        "multiply_us": lambda: multiply(quantized, out, None),
        "direct_us": lambda: multiply(backend.quantize_activation(x, offer), out, None),
        "empty_us": lambda: torch.empty((M, N), dtype=torch.bfloat16, device="cuda"),
    }
    measured = {what: host_us(call) for what, call in times.items()}
    return {"backend": name, "m": M, "n": N, "k": K, **measured}


def host_us(call: Callable[[], object]) -> float:
    """Median microseconds of the calling thread."""
    taken = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - started) / CALLS * 1e6)
    return round(statistics.median(taken), 2)


if __name__ == "__main__":
    sys.exit(main())
