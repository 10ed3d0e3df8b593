"""The kernels between grouped products compile for Hopper, without a GPU."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    BlockFormat,
    ScaleLayout,
)

if TYPE_CHECKING:
    from blockscale.kernels.triton.build import Variant

pytest.importorskip("triton", reason="compiles kernels without a GPU")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize(
    ("fmt", "layout", "dtype"),
    [
        (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED, torch.float16),
        (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED, torch.bfloat16),
    ],
    ids=["fp32", "packed"],
)
def test_every_step_compiles(
    monkeypatch: pytest.MonkeyPatch, fmt: BlockFormat, layout: ScaleLayout, dtype: torch.dtype
) -> None:
    """Two kernels arrange, two quantize, one combines; arranging has a variant for few ids."""
    from blockscale.kernels.triton import rows

    made: list[Variant] = []
    monkeypatch.setattr(rows, "launcher", lambda variant, _: made.append(variant))
    spec = rows.RowsSpec(fmt, layout, 64, 256, dtype, 3072, 1536, 0, overlaps=True)
    for kind in (rows.ContiguousRows, rows.MaskedRows):
        kind(spec)
    variants = dict.fromkeys(made)
    names = [variant.kernel.__name__ for variant in variants]
    assert sorted(set(names)) == [
        "arrange_kernel",
        "combine_kernel",
        "count_kernel",
        "gather_quantize_kernel",
        "silu_multiply_quantize_rows_kernel",
    ]
    assert (names.count("arrange_kernel"), names.count("count_kernel")) == (4, 2)
    for variant in variants:
        text = variant.compile(90).asm["ptx"]
        assert ".target sm_90" in text
        # Nothing is read or written before the kernel ahead has ended.
        before, _ = text.split("griddepcontrol.wait;")
        assert not re.search(r"(ld|st|cp)\.[a-z.]*global", before)
        assert "griddepcontrol.launch_dependents;" in text
        # Nothing is added by whoever comes first.
        assert "atom.global" not in text
        assert "red.global" not in text
