"""FlashInfer's block-scaled FP8 GEMMs: three kernels that share a package and nothing else.

Architectures: SM90 (swap-AB, small M), SM100/SM103 (TRT-LLM), SM100 to SM121 (CUTLASS).
Blocks: weights 128x128, activations 1x128, float32 scales. Output: bfloat16, CUTLASS also float16.
CUTLASS and TRT-LLM read both operands' scales as (K blocks, MN); SM90 reads them as stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_BY_MN,
    K_MAJOR,
    BlockShape,
    DType,
)
from blockscale.planning.decision import MRange, Obstacle, Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "flashinfer-python"
BLOCKS = (BlockShape(128, 128),)

# gemm_base.py, @supported_compute_capability of gemm_fp8_nt_groupwise (0.7.2).
TRTLLM_ARCHITECTURES = ((10, 0), (10, 3))
CUTLASS_ARCHITECTURES = ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1))

# _gemm_fp8_nt_groupwise requirement function (0.7.2).
TRTLLM_MIN_K = 256

# The swap-AB half of fp8_blockscale_gemm_sm90; above it a slower kernel answers the same call
# (SGLang #32843: 1.42x slower at M 32-64), and M = 0 crashes.
SM90_M_RANGE = MRange(1, 31)

_BLOCKWISE_FORMS = (OperandForm(FP8_128X128_FP32, K_BY_MN), OperandForm(FP8_1X128_FP32, K_BY_MN))


class FlashInferTrtllm:
    """``gemm_fp8_nt_groupwise(backend="trtllm")``."""

    name = "flashinfer_trtllm"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(TRTLLM_ARCHITECTURES)
        gates.package(PACKAGE)
        gates.cuda_at_least(12, 8)
        gates.blocks(BLOCKS)
        gates.out_dtypes(
            (DType.BFLOAT16,),
            "its API accepts float16, but SGLang measured accuracy 0 with it (PR #22300)",
        )
        gates.multiples(128, 128, "scales of partial blocks are not documented")
        gates.unless(
            request.k >= TRTLLM_MIN_K, Obstacle.ALIGNMENT, f"K={request.k} is below {TRTLLM_MIN_K}"
        )
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        weight, activation = _BLOCKWISE_FORMS
        return Offer(self.name, weight, activation, notes=bias_notes(request))


class FlashInferCutlass:
    """``gemm_fp8_nt_groupwise(backend="cutlass")``."""

    name = "flashinfer_cutlass"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(CUTLASS_ARCHITECTURES)
        gates.package(PACKAGE)
        gates.cuda_at_least(12, 8)
        gates.blocks(BLOCKS)
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16))
        gates.multiples(128, 128, "it counts scale blocks by floor division")
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        weight, activation = _BLOCKWISE_FORMS
        return Offer(self.name, weight, activation, notes=bias_notes(request))


class FlashInferSm90:
    """``fp8_blockscale_gemm_sm90``, used for small M only; it quantizes activations itself."""

    name = "flashinfer_sm90"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer for few tokens, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(((9, 0),))
        gates.package(PACKAGE)
        gates.cuda_at_least(12, 8)
        gates.blocks(BLOCKS)
        gates.activation_dtypes((DType.BFLOAT16,), "it quantizes inside")
        gates.out_dtypes((DType.BFLOAT16,))
        gates.multiples(64, 128)
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR),
            None,
            SM90_M_RANGE,
            notes=(
                "its own activation quantization was less accurate on some checkpoints "
                "(SGLang #32843)",
                *bias_notes(request),
            ),
        )
