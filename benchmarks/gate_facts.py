"""Questions about providers that sources dispute, asked of the machine.

    python benchmarks/gate_facts.py [--out FILE]

1. Does DeepGEMM need N % 64 == 0 and K % 128 == 0 on SM90? SGLang and vLLM say so; 0.1.5 launches
   other sizes without an error.
2. What do wrong values in the L4 padding of torch's weight scales do, and wrong activation rows in
   the padding of M?
3. Does our packed UE8M0 equal DeepGEMM's own packing, bit for bit?

Every answer is a relative error against float64 of the dequantized operands, or a count of
differing bytes. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    K_MAJOR_PADDED_TRANSPOSED,
    MN_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    ScaleFormat,
)
from blockscale.reference import dequantize, quantize, relayout
from record import need_gpu, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.tensor import BlockScaledTensor

SIZES = [(64, 128), (192, 512), (200, 512), (208, 1024), (576, 1088), (576, 960), (2112, 704)]
TOKENS = (7, 128)
RIGHT = 0.005


def main() -> int:
    """Ask everything that can be asked here and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu()
    answers = [*deep_gemm_sizes(), *torch_padding(), *packing()]
    if options.out:
        options.out.write_text(
            "".join(json.dumps(record("gate_facts", **a)) + "\n" for a in answers)
        )
    for answer in answers:
        print(json.dumps(answer))
    return 0


def operands(m: int, n: int, k: int) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    """A quantized activation and weight of normal data."""
    generator = torch.Generator(device="cuda").manual_seed(m + n + k)
    activation = torch.randn(m, k, generator=generator, device="cuda")
    weight = torch.randn(n, k, generator=generator, device="cuda")
    return quantize(activation, FP8_1X128_FP32), quantize(weight, FP8_128X128_FP32)


def error_of(out: torch.Tensor, a: BlockScaledTensor, w: BlockScaledTensor) -> float:
    """Relative Frobenius error against float64; NaN where an element is NaN."""
    exact = dequantize(a).double() @ dequantize(w).double().T
    return float((out.double() - exact).norm() / exact.norm())


def attempt(question: str, run: Callable[[], float], **facts: object) -> dict[str, object]:
    """One answer: the error, or what the provider said instead."""
    try:
        error = run()
    except Exception as refusal:  # noqa: BLE001 - what a provider raises is the answer
        first = (str(refusal).strip().splitlines() or [""])[0]
        return {
            "question": question,
            **facts,
            "refused": f"{type(refusal).__name__}: {first[:200]}",
        }
    return {"question": question, **facts, "relative_error": error, "right": error < RIGHT}


def deep_gemm_sizes() -> list[dict[str, object]]:
    """DeepGEMM at sizes beside its documented gates."""
    try:
        import deep_gemm
    except ImportError as error:
        return [{"question": "deep_gemm", "refused": str(error)}]

    def run(m: int, n: int, k: int) -> float:
        a, w = operands(m, n, k)
        moved = relayout(a, MN_MAJOR_TMA_ALIGNED)
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        deep_gemm.fp8_gemm_nt(
            (moved.data, moved.scales), (w.data, w.scales), out, compiled_dims="nk"
        )
        torch.cuda.synchronize()
        return error_of(out, a, w)

    return [
        attempt("deep_gemm size", lambda m=m, n=n, k=k: run(m, n, k), m=m, n=n, k=k)
        for n, k in SIZES
        for m in TOKENS
    ]


def torch_padding() -> list[dict[str, object]]:
    """Torch's scaled_mm with other values in the padding of its weight scales."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    def run(fill: float, k: int) -> float:
        a, w = operands(128, 256, k)
        left, right = relayout(a, MN_MAJOR), relayout(w, K_MAJOR_PADDED_TRANSPOSED)
        right.scales[k // 128 :] = fill
        out = scaled_mm(
            left.data,
            right.data.T,
            left.scales,
            ScalingType.BlockWise1x128,
            right.scales,
            ScalingType.BlockWise128x128,
            swizzle_a=SwizzleType.NO_SWIZZLE,
            swizzle_b=SwizzleType.NO_SWIZZLE,
            output_dtype=torch.float32,
        )
        return error_of(out, a, w)

    return [
        attempt("torch L4 padding", lambda f=fill, k=k: run(f, k), fill=str(fill), k=k)
        for k in (640, 768)
        for fill in (0.0, 1.0, 1e30, float("nan"))
    ]


def packing() -> list[dict[str, object]]:
    """Our packed UE8M0 against DeepGEMM's own."""
    try:
        from deep_gemm import get_mn_major_tma_aligned_packed_ue8m0_tensor as theirs
    except ImportError as error:
        return [{"question": "packing", "refused": str(error)}]
    found = []
    for m, k in ((1, 128), (7, 640), (128, 7168), (129, 2304)):
        tensor = quantize(torch.randn(m, k, device="cuda"), FP8_1X128_UE8M0)
        as_float = relayout(tensor, tensor.layout, ScaleFormat.FP32)
        ours = relayout(tensor, MN_MAJOR_TMA_ALIGNED_PACKED).scales
        other = theirs(as_float.scales)
        found.append(
            {
                "question": "packing",
                "m": m,
                "k": k,
                "same_shape": list(ours.shape) == list(other.shape),
                "same_strides": list(ours.stride()) == list(other.stride()),
                "differing_words": int((ours != other).sum()),
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
