"""The founding case, SGLang PR #22300: a float16 model with 128x128 block scales, on a GPU.

    python benchmarks/fp16_model.py [--layers 4] [--out FILE]

MiniMax-M2.5's attention and one expert's shapes, random weights, several layers, float16
activations, decode batches and a 4096-token prefill. Three ways to run every linear layer:

a) scales packed to UE8M0 at load for DeepGEMM, which then cannot run float16: unpacked to float32
   with torch operators on every call, then Triton (what happened before the pull request)
b) float32 scales, Triton (after it)
c) blockscale's plan for this machine

Experts run as dense layers here, each token through one expert: grouped kernels are another
benchmark. Results are compared with float32 products of the dequantized operands before timing.
The layers' weights together are several times the L2 cache, so weights come from memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    DType,
    PowerOfTwo,
)
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import dequantize, quantize, relayout
from record import append_to, need_gpu, record
from timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor

SHAPES = {"qkv": (8192, 3072), "o": (3072, 6144), "w13": (3072, 3072), "w2": (3072, 1536)}
TOKENS = (1, 8, 16, 64, 4096)
MAX_RELATIVE_ERROR = 0.002
MANTISSA_BITS = 23


@dataclass(frozen=True)
class Layer:
    """One linear layer in the three ways; ``floats``: its dequantized weight."""

    name: str
    unpacking: Callable[[torch.Tensor], torch.Tensor]
    triton: BlockScaledLinear
    planned: BlockScaledLinear
    floats: torch.Tensor


def main() -> int:
    """Check, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines, one record for each token count")
    options = parser.parse_args()
    need_gpu()
    layers = [make_layer(name, seed) for seed in range(options.layers) for name in SHAPES]
    print("planned:", {layer.name: layer.planned.plan.backends for layer in layers[: len(SHAPES)]})
    print(" tokens |  a) unpack  b) triton    c) plan | c against a | c against b")
    lines = [measure(layers, tokens) for tokens in TOKENS]
    if options.out:
        append_to(options.out, *lines)
    return 0


def make_layer(name: str, seed: int) -> Layer:
    """Random weights with power-of-two scales, so that all three ways compute the same numbers."""
    n, k = SHAPES[name]
    generator = torch.Generator(device="cuda").manual_seed(seed)
    floats = torch.randn(n, k, generator=generator, device="cuda") / k**0.5
    weight = relayout(quantize(floats, FP8_128X128_UE8M0), K_MAJOR, FP8_128X128_FP32.scale)
    triton = BlockScaledLinear(plan(name, n, k, ("triton",)), weight)
    planned = BlockScaledLinear(plan(name, n, k, None), weight)
    return Layer(name, unpacking(weight), triton, planned, dequantize(weight))


def plan(name: str, n: int, k: int, backends: tuple[str, ...] | None) -> LinearPlan:
    """A float16 layer on this machine."""
    request = LinearRequest(
        name, n, k, FP8_128X128_FP32, DType.FLOAT16, DType.FLOAT16, PowerOfTwo.YES
    )
    return plan_linear(request, detect_device(), PlanPolicy(backends=backends), BACKENDS)


def unpacking(weight: BlockScaledTensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Variant a: scales lie packed, and every call restates them as float32 for Triton."""
    packed = relayout(weight, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW, FP8_128X128_UE8M0.scale)
    offer = plan("a", weight.mn, weight.k, ("triton",)).choices[0].offer
    backend = runnable_backend_named("triton")
    restated = relayout(weight, K_MAJOR)
    multiply = backend.bind(backend.prepare(restated, offer), offer)
    blocks = restated.scales.shape[1]

    def call(activation: torch.Tensor) -> torch.Tensor:
        exponents = packed.scales.contiguous().view(torch.uint8)[:, :blocks]
        torch.bitwise_left_shift(
            exponents[::128].to(torch.int32), MANTISSA_BITS, out=restated.scales.view(torch.int32)
        )
        out = activation.new_empty((activation.shape[0], weight.mn))
        multiply(backend.quantize_activation(activation, offer), out, None)
        return out

    return call


def measure(layers: list[Layer], tokens: int) -> dict[str, object]:
    """All layers once, each on its own activation: microseconds of the three ways."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    inputs = [
        torch.randn(tokens, SHAPES[layer.name][1], generator=generator, device="cuda").half()
        for layer in layers
    ]
    for layer, activation in zip(layers, inputs, strict=True):
        check(layer, activation)
    timings = interleaved(
        {
            "a": lambda: [la.unpacking(x) for la, x in zip(layers, inputs, strict=True)],
            "b": lambda: [la.triton(x) for la, x in zip(layers, inputs, strict=True)],
            "c": lambda: [la.planned(x) for la, x in zip(layers, inputs, strict=True)],
        }
    )
    a, b, c = (timings[name].median_us for name in "abc")
    print(f"{tokens:7d} | {a:11.1f} {b:10.1f} {c:10.1f} | {a / c:10.2f}x | {b / c:10.2f}x")
    return record(
        "fp16_model",
        m=tokens,
        layers=len(layers),
        unpack_us=round(a, 2),
        triton_us=round(b, 2),
        plan_us=round(c, 2),
        speedup_over_unpack=round(a / c, 3),
        speedup_over_triton=round(b / c, 3),
        backends=sorted({name for layer in layers for name in layer.planned.plan.backends}),
        timing="cuda_graph",
    )


def check(layer: Layer, activation: torch.Tensor) -> None:
    """All three ways against a float32 product; quantizing activations costs about 3 %."""
    exact = activation.float() @ layer.floats.T
    first = layer.triton(activation).float()
    for out in (layer.unpacking(activation).float(), layer.planned(activation).float()):
        if (out - first).norm() > MAX_RELATIVE_ERROR * first.norm():
            sys.exit(f"{layer.name}: the three ways disagree")
    if not (first - exact).norm() < 0.05 * exact.norm():
        sys.exit(f"{layer.name}: wrong by more than quantization explains")


if __name__ == "__main__":
    sys.exit(main())
