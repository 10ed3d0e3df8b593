"""cuBLASLt's block-scaled GEMM through ``torch.nn.functional.scaled_mm``.

Architectures: SM90, with CUDA 12.9 or newer. Output: bfloat16, float16, float32.
Blocks: weights 128x128, activations 1x128, float32 scales.
Weight scales are K-major with K blocks padded to four (L4); activation scales MN-major, M padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR_PADDED_TRANSPOSED,
    MN_MAJOR,
    BlockShape,
    DType,
)
from blockscale.planning.decision import Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

# ATen/native/cuda/ScaledBlas.cpp: block recipes need compute capability 9.0 and cuBLASLt 12.9.
ARCHITECTURES = ((9, 0),)
# torch checks N % 16 and K % 16; K % 128 keeps to shapes whose numbers were compared (baseline).
N_MULTIPLE, K_MULTIPLE = 16, 128


class TorchScaledMm:
    """The gates and forms of torch's block-scaled matmul."""

    name = "torch_scaled_mm"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(ARCHITECTURES, "torch has the block recipes for SM90 only")
        gates.cuda_at_least(12, 9)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
        gates.multiples(N_MULTIPLE, K_MULTIPLE)
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR_PADDED_TRANSPOSED),
            OperandForm(FP8_1X128_FP32, MN_MAJOR),
            notes=("M is padded to a multiple of four", *bias_notes(request)),
        )
