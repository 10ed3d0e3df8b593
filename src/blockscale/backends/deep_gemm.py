"""DeepGEMM (deepseek-ai/DeepGEMM; wheels: sgl-deep-gemm), JIT-compiled Hopper and Blackwell GEMMs.

Architectures: SM90, SM100, SM103. Blocks: weights 128x128, activations 1x128. Output: bfloat16.
SM90 reads float32 scales: weights as stored, activations MN-major and TMA-aligned.
SM100 reads UE8M0 packed four to an int32, weights with one scale per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    BlockShape,
    DType,
)
from blockscale.planning.decision import Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "sgl-deep-gemm"

# csrc/apis/layout.hpp: default recipe by architecture (upstream 54e2261).
_FP32_FORMS = (
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)
_PACKED_FORMS = (
    OperandForm(FP8_128X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW),
    OperandForm(FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
)
FORMS = {(9, 0): _FP32_FORMS, (10, 0): _PACKED_FORMS, (10, 3): _PACKED_FORMS}

# facts/sglang.md 2.1, 2.4: upstream HEAD dispatches on arch 9 and 10 only.
MISSING = {
    (11, 0): "upstream has no kernel for it",
    (12, 0): "only forks have it, with differing ABIs; upstream raises 'Unknown SF transformation'",
    (12, 1): "only forks have it, with differing ABIs; upstream raises 'Unknown SF transformation'",
}

# README: CUDA 12.3 for SM90, 12.9 for SM100.
CUDA = {(9, 0): (12, 3), (10, 0): (12, 9), (10, 3): (12, 9)}

# SGLang's and vLLM's gate. On an H200, 0.1.5 launched N = 192, 200 and K = 1088, 960 without an
# error, but nobody compared the numbers (baseline/h200.md), so the documented gate stands.
N_MULTIPLE, K_MULTIPLE = 64, 128


class DeepGemm:
    """The gates and forms of DeepGEMM: dense layers, and experts (contiguous and masked)."""

    name = "deep_gemm"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(FORMS, MISSING)
        gates.package(PACKAGE)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16,), f"a {request.out_dtype.value} model cannot run on it")
        gates.multiples(N_MULTIPLE, K_MULTIPLE)
        gates.whole_blocks()
        if device.capability in CUDA:
            gates.cuda_at_least(*CUDA[device.capability])
        if gates.rejections or device.capability is None:
            return gates.rejections
        weight, activation = FORMS[device.capability]
        return Offer(
            self.name,
            weight,
            activation,
            notes=("compiles at prepare, once per (N, K)", *bias_notes(request)),
        )
