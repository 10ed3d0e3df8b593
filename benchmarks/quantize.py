"""Bandwidth of the Triton quantizers, as a share of what a copy kernel reaches.

    python benchmarks/quantize.py [--out FILE]

Bytes are those that must move: inputs once, codes, scales and (for add and RMSNorm) the new
residual once. Inputs are 64 MB and more, above the L2 cache of an H200.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
)
from blockscale.kernels.triton.destination import QuantizerSpec
from blockscale.kernels.triton.normalize import NormalizeQuantizer
from blockscale.kernels.triton.quantize import (
    activation_quantizer,
    silu_multiply_quantizer,
)
from record import append_to, need_gpu, record
from timing import copy_bandwidth, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPES = ((8192, 7168), (16384, 4096), (32768, 2048))
FORMS = (
    (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    (FP8_1X128_FP32, K_MAJOR),
    (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> int:
    """Measure every kernel, form and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu()
    ceiling = copy_bandwidth()
    lines = []
    for facts, moved, call in kernels():
        timing = interleaved({"call": call}, rounds=10, replays=5)["call"]
        rate = moved / timing.median_us * 1e6
        line = record(
            "quantize",
            **facts,
            time_us=round(timing.median_us, 2),
            p10_us=round(timing.p10_us, 2),
            p90_us=round(timing.p90_us, 2),
            gb_s=round(rate / 1e9),
            share_of_copy=round(rate / ceiling, 3),
            copy_gb_s=round(ceiling / 1e9),
        )
        lines.append(line)
        print(*facts.values(), f"{timing.median_us:.1f} us, {rate / ceiling:.0%} of copy")
    if options.out:
        append_to(options.out, *lines)
    return 0


def kernels() -> Iterator[tuple[dict[str, object], int, Callable[[], object]]]:
    """What is measured, the bytes it moves, and the call."""
    for m, k in SHAPES:
        for dtype in DTYPES:
            wide = torch.randn(m, 2 * k, device="cuda").to(dtype)
            values, residual = (half.contiguous() for half in wide.chunk(2, dim=-1))
            weight = torch.rand(k, device="cuda").to(dtype)
            size = values.nbytes
            for fmt, layout in FORMS:
                spec = QuantizerSpec(fmt, layout, dtype, k, torch.cuda.current_device())
                written = m * k + layout.stored(m, k, fmt).bytes
                facts = {"m": m, "k": k, "dtype": str(dtype).removeprefix("torch.")}
                facts |= {"format": fmt.name, "layout": layout.name}
                normalize = NormalizeQuantizer(spec, weight, 1e-6, has_residual=False)
                add = NormalizeQuantizer(spec, weight, 1e-6, has_residual=True)
                calls = {
                    "quantize": (size, partial(activation_quantizer(spec), values)),
                    "silu": (2 * size, partial(silu_multiply_quantizer(spec), wide)),
                    "rms_norm": (size, partial(normalize, values)),
                    "add_rms_norm": (3 * size, partial(add, values, residual)),
                }
                for name, (moved, call) in calls.items():
                    yield {"kernel": name, **facts}, moved + written, call


if __name__ == "__main__":
    sys.exit(main())
