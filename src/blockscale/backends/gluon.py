"""Warp-specialised Hopper GEMM in Gluon, blockscale's own: DeepGEMM's contract, any output dtype.

Architectures: SM90. Output: bfloat16, float16, float32; fused bias.
Blocks: weights 128x128, activations 1x128, float32 scales, ceil(K / 128) of them.
Scales lie as DeepGEMM's on SM90: weights as stored, activations MN-major and TMA-aligned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockShape,
    DType,
)
from blockscale.planning.decision import Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "triton"
# Warpgroup MMA (wgmma) exists on SM90 only (PTX ISA).
ARCHITECTURES = ((9, 0),)
# The first release whose Gluon has TMA, mbarriers and warpgroup_mma (baseline/h200.md).
FIRST_TRITON = (3, 6)
# TMA: rows of the operands and of the output start on 16 bytes (cuTensorMapEncodeTiled).
TMA_BYTES = 16


class Gluon:
    """The gates and forms of the Gluon kernels."""

    name = "gluon"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(ARCHITECTURES)
        gates.package(PACKAGE)
        gates.package_at_least(PACKAGE, *FIRST_TRITON)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
        gates.multiples(TMA_BYTES // request.out_dtype.bytes, TMA_BYTES, "TMA rows are 16 bytes")
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR),
            OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
        )
