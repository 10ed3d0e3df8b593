"""What ptxas makes of the quantizers for Hopper, without a GPU: instructions, few enough."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
)

if TYPE_CHECKING:
    from blockscale.kernels.triton.build import Variant
    from blockscale.kernels.triton.destination import QuantizerSpec

pytest.importorskip("triton", reason="compiles kernels without a GPU")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMS = {
    "fp32": (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    "packed": (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
}
# Shared memory of an H100's multiprocessor.
SHARED_BYTES = 228 << 10
# Instructions in the loop over rows, of one warp and row (ptxas 12.8), and 3 % for another ptxas.
# Four warps share a row of 7168 or 4096, two one of 2048, twice as many of float32. What memory
# takes for a row of 7168 bfloat16 is 1156 clocks; a scheduler issues one instruction a clock.
ROW_LOOPS = [
    ("rms_norm", 7168, BF16, "fp32", 945),
    ("rms_norm", 7168, BF16, "packed", 895),
    ("rms_norm", 7168, FP16, "fp32", 905),
    ("rms_norm", 7168, FP32, "fp32", 645),
    ("rms_norm", 4096, BF16, "fp32", 535),
    ("rms_norm", 2048, BF16, "fp32", 510),
    ("add_rms_norm", 7168, BF16, "fp32", 1015),
]
TILES = [
    ("quantize", BF16, "fp32", 377),
    ("quantize", FP32, "fp32", 516),
    ("silu", BF16, "fp32", 1042),
]


def spec_of(dtype: torch.dtype, form: str, k: int) -> QuantizerSpec:
    from blockscale.kernels.triton.destination import QuantizerSpec

    fmt, layout = FORMS[form]
    return QuantizerSpec(fmt, layout, dtype, k, 0, overlaps=True)


def code_of(variant: Variant) -> list[str]:
    """SASS, once nothing is known to spill."""
    from blockscale.testing import sass

    compiled = variant.compile(90)
    found = sass.resources(compiled.asm["ptx"])
    assert (found.spilled_bytes, found.stack_bytes) == (0, 0)
    return sass.disassemble(compiled.asm["cubin"])


@pytest.mark.parametrize(("name", "k", "dtype", "form", "most"), ROW_LOOPS, ids=str)
def test_the_loop_over_rows_is_bound_by_memory(
    name: str, k: int, dtype: torch.dtype, form: str, most: int
) -> None:
    from blockscale.kernels.triton.normalize import shape, variant
    from blockscale.testing import sass

    spec = spec_of(dtype, form, k)
    code = code_of(variant(spec, 16, SHARED_BYTES, has_residual=name == "add_rms_norm"))
    [loop] = sass.inner_loops(code, "F2FP")
    found = sass.count(loop)
    cut = shape(k, dtype.itemsize)
    inputs = 1 + (name == "add_rms_norm")
    # The next rows' loads are under way, 16 bytes at a time; so are loads from shared memory.
    assert found["LDGSTS"] == 2 * cut.tiles * inputs
    assert sum("LDGSTS.E.BYPASS.128" in line for line in loop) == found["LDGSTS"]
    assert sum("LDS.128" in line for line in loop) == found["LDGSTS"]
    if dtype is not FP32:
        # Eight threads share a block: three exchanges for its largest value, as many for each sum.
        assert found["MUFU"] <= cut.tiles + 2
        assert not {"F2F", "F2I", "I2F"} & set(found)
    assert found["LDL"] == 0
    assert found["BAR"] <= 11
    assert found.total() - found["NOP"] <= most


@pytest.mark.parametrize(("name", "dtype", "form", "most"), TILES, ids=str)
def test_tiles_do_not_grow(name: str, dtype: torch.dtype, form: str, most: int) -> None:
    from blockscale.kernels.triton.quantize import activation_variant, silu_multiply_variant
    from blockscale.testing import sass

    make = activation_variant if name == "quantize" else silu_multiply_variant
    found = sass.count(code_of(make(spec_of(dtype, form, 4096), 16)))
    assert found.total() - found["NOP"] <= most


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rows_that_start_anywhere_compile(dtype: torch.dtype) -> None:
    from blockscale.kernels.triton.normalize import variant

    code_of(variant(spec_of(dtype, "fp32", 301), 1, SHARED_BYTES, has_residual=True))
