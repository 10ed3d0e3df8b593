"""FlashInfer's Hopper GEMM, ``fp8_blockscale_gemm_sm90``: TensorRT-LLM's DeepGEMM, for few tokens.

Architectures: SM90. Blocks: weights 128x128, activations 1x128, float32 scales. Output: bfloat16.
Weight scales as stored; activation scales MN-major, columns padded to 16 bytes for TMA.
Blockscale quantizes, and runs it only on a machine where the probe has proven it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.flashinfer_package import (
    PACKAGE,
    check_form,
    contiguous,
    function_named,
    readiness_once_proven,
    run_once,
)
from blockscale.backends.gates import Gates, bias_notes, dispute_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockShape,
    DType,
)
from blockscale.planning.decision import MRange, Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

# The swap-AB half; above it a slower kernel answers the same call (SGLang #32843: 1.42x slower at
# M 32-64).
M_RANGE = MRange(1, 31)

# fp8_blockscale_gemm_sm90 (0.7.2) raises ValueError unless N % 64 and K % 128 are 0.
N_MULTIPLE, K_MULTIPLE = 64, 128

# deep_gemm/fp8_gemm.cuh: make_2d_tma_scales_b_desc_swapAB. Row-major scales are read without an
# error, into wrong numbers: FlashInfer's own test of this call passes such ones, and asks for a
# cosine of 0.967 only.
_DISPUTE = (
    "FlashInfer documents activation scales as (M, K/128), which its kernel reads column by column"
)


class FlashInferSm90:
    """``fp8_blockscale_gemm_sm90``, used for small M only, on activations quantized before."""

    name = "flashinfer_sm90"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer for few tokens, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(((9, 0),))
        gates.package(PACKAGE)
        gates.cuda_at_least(12, 8)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16,))
        gates.multiples(N_MULTIPLE, K_MULTIPLE)
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR),
            OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
            M_RANGE,
            readiness=readiness_once_proven(request, device, self.name),
            notes=(*dispute_notes(gates, _DISPUTE), *bias_notes(request)),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """The weight in contiguous memory, after a product of zeros for every M in range.

        That builds FlashInfer's library on a machine that never ran it (minutes, unless the wheel
        brings it) and compiles a kernel for each tile that some M takes, with nvcc; kept in
        ~/.cache/flashinfer and ~/.tensorrt_llm. Raises BackendError if it cannot be imported or
        does not build.
        """
        check_form(weight, offer.weight)
        weight = contiguous(weight)
        run_once(
            self.bind(weight, offer), weight, offer, range(M_RANGE.min_m, (M_RANGE.max_m or 0) + 1)
        )
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """By one Triton kernel, straight into the layout that the kernel reads."""
        from blockscale.kernels.triton.quantize import quantize_rows

        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """One FlashInfer call; a bias is added by a second kernel, after rounding."""
        gemm = function_named("fp8_blockscale_gemm_sm90")

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            gemm(activation.data, weight.data, activation.scales, weight.scales, out=out)
            if bias is not None:
                out.add_(bias)

        return multiply
