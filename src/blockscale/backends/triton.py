"""Block-scaled GEMM in plain Triton, blockscale's own portable kernel.

Architectures: SM89 and newer (FP8 tensor cores). Output: bfloat16, float16, float32; fused bias.
Blocks: weights 128x128, activations 1x128, float32 scales; any N and K, ragged included.
Scales lie as stored, K-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, BlockShape, DType
from blockscale.planning.decision import Obstacle, Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "triton"
# PTX ISA: mma with .e4m3 operands needs sm_89.
FIRST_ARCHITECTURE = (8, 9)


class Triton:
    """The gates and forms of the plain Triton kernel: dense layers and experts."""

    name = "triton"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.unless(
            device.capability is not None and device.capability >= FIRST_ARCHITECTURE,
            Obstacle.ARCHITECTURE,
            f"needs FP8 tensor cores (sm_89 or newer), not {device.architecture}",
        )
        gates.package(PACKAGE)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
        gates.whole_blocks()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR),
            OperandForm(FP8_1X128_FP32, K_MAJOR),
        )
