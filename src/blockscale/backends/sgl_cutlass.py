"""CUTLASS block-scaled GEMM of sgl-kernel (``fp8_blockwise_scaled_mm``).

Architectures: SM120, SM121; sgl-kernel refuses SM90 and SM100 as deprecated.
Blocks: weights 128x128, activations 1x128, float32 scales. Output: bfloat16, float16.
Weight scales are a transposed view of the stored ones; activation rows are padded to four, zeroed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR_TRANSPOSED,
    MN_MAJOR_PADDED,
    BlockShape,
    DType,
)
from blockscale.planning.decision import Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "sgl-kernel"
ARCHITECTURES = ((12, 0), (12, 1))
# Its dispatcher raises on them.
_DEPRECATED = "deprecated there, sgl-kernel raises"
MISSING = {(9, 0): _DEPRECATED, (10, 0): _DEPRECATED, (10, 3): _DEPRECATED}


class SglCutlass:
    """The gates and forms of sgl-kernel's CUTLASS GEMM."""

    name = "sgl_cutlass"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(ARCHITECTURES, MISSING)
        gates.package(PACKAGE)
        gates.cuda_at_least(12, 8)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16))
        gates.multiples(128, 128, "it counts scale blocks by floor division")
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR_TRANSPOSED),
            OperandForm(FP8_1X128_FP32, MN_MAJOR_PADDED),
            notes=bias_notes(request),
        )
