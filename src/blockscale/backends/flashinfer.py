"""FlashInfer's block-scaled FP8 GEMMs: three kernels that share a package and nothing else.

Architectures: SM90 (swap-AB, small M), SM100/SM103 (TRT-LLM), SM100/SM103/SM12x (CUTLASS).
Blocks: weights 128x128, activations 1x128, float32 scales. Output: bfloat16, CUTLASS also float16.
CUTLASS and TRT-LLM read both operands' scales as (K blocks, MN); SM90 reads them as stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes, dispute_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_BY_MN,
    K_MAJOR,
    BlockShape,
    DType,
)
from blockscale.planning.decision import MRange, Obstacle, Offer, OperandForm
from blockscale.planning.device import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest

PACKAGE = "flashinfer-python"
BLOCKS = (BlockShape(128, 128),)

# gemm_base.py, @supported_compute_capability of gemm_fp8_nt_groupwise (0.7.2).
TRTLLM_ARCHITECTURES = ((10, 0), (10, 3))
CUTLASS_ARCHITECTURES = ((10, 0), (10, 3), (12, 0), (12, 1))
# SGLang's own list has it, FlashInfer's decorator does not and would raise.
CUTLASS_MISSING = {(11, 0): "only its cutile backend lists sm_110"}

# _gemm_fp8_nt_groupwise requirement function (0.7.2).
TRTLLM_MIN_K = 256

# The swap-AB half of fp8_blockscale_gemm_sm90; above it a slower kernel answers the same call
# (SGLang #32843: 1.42x slower at M 32-64), and M = 0 crashes.
SM90_M_RANGE = MRange(1, 31)

_BLOCKWISE_FORMS = (OperandForm(FP8_128X128_FP32, K_BY_MN), OperandForm(FP8_1X128_FP32, K_BY_MN))

_TRTLLM_DISPUTE = (
    "FlashInfer documents weight scales as (K/128, N/128), SGLang passes them as "
    "stored (facts/sglang.md 1.3)"
)
_CUTLASS_DISPUTE = (
    "documentation and kernel once disagreed about scale order (facts/sglang.md 6, item 17)"
)
_SM90_DISPUTE = (
    "its own activation quantization was less accurate on some checkpoints (SGLang #32843)"
)


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
        proven = device.proof(self.name, DType.FLOAT16)
        gates.out_dtypes(
            (DType.BFLOAT16, DType.FLOAT16)
            if proven is not None and proven.verdict is Verdict.PROVEN
            else (DType.BFLOAT16,),
            "its API accepts float16, but SGLang measured accuracy 0 with it (PR #22300) and the "
            "probe has not proven it here",
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
        return Offer(
            self.name,
            weight,
            activation,
            notes=(*dispute_notes(gates, _TRTLLM_DISPUTE), *bias_notes(request)),
        )


class FlashInferCutlass:
    """``gemm_fp8_nt_groupwise(backend="cutlass")``."""

    name = "flashinfer_cutlass"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(CUTLASS_ARCHITECTURES, CUTLASS_MISSING)
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
        return Offer(
            self.name,
            weight,
            activation,
            notes=(
                *dispute_notes(gates, _CUTLASS_DISPUTE),
                "M is padded to a multiple of four",
                *bias_notes(request),
            ),
        )


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
            notes=(*dispute_notes(gates, _SM90_DISPUTE), *bias_notes(request)),
        )
