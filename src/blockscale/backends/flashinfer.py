"""FlashInfer's Blackwell GEMM, ``gemm_fp8_nt_groupwise``: two kernels behind one function.

Architectures: SM100/SM103 (TRT-LLM), SM100/SM103/SM12x (CUTLASS).
Blocks: weights 128x128, activations 1x128, float32 scales. Output: bfloat16, CUTLASS also float16.
Both read both operands' scales as (K blocks, MN). Written by its documentation (0.7.2), never run
here: blockscale runs it only on a machine where the probe has proven it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

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
    K_BY_MN,
    BlockShape,
    DType,
    round_up,
)
from blockscale.planning.decision import Obstacle, Offer, OperandForm
from blockscale.planning.device import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

BLOCKS = (BlockShape(128, 128),)

# gemm_base.py, @supported_compute_capability of gemm_fp8_nt_groupwise (0.7.2).
TRTLLM_ARCHITECTURES = ((10, 0), (10, 3))
CUTLASS_ARCHITECTURES = ((10, 0), (10, 3), (12, 0), (12, 1))
# SGLang's own list has it, FlashInfer's decorator does not and would raise.
CUTLASS_MISSING = {(11, 0): "only its cutile backend lists sm_110"}

# _gemm_fp8_nt_groupwise requirement function (0.7.2).
TRTLLM_MIN_K = 256

# "The m should be padded to a multiple of 4 before calling this function" (0.7.2).
M_MULTIPLE = 4

_BLOCKWISE_FORMS = (OperandForm(FP8_128X128_FP32, K_BY_MN), OperandForm(FP8_1X128_FP32, K_BY_MN))

_TRTLLM_DISPUTE = (
    "FlashInfer documents weight scales as (K/128, N/128), SGLang passes them as stored"
)
_CUTLASS_DISPUTE = "documentation and kernel once disagreed about scale order"


_PADDED = "M is padded to a multiple of four, which costs copies where it is none"


class _Groupwise:
    """What both kernels have in common: the offer, and how they run."""

    name: ClassVar[str]
    _call: ClassVar[dict[str, str | None]]

    def _offer(self, gates: Gates, dispute: str) -> Offer:
        weight, activation = _BLOCKWISE_FORMS
        return Offer(
            self.name,
            weight,
            activation,
            readiness=readiness_once_proven(gates.request, gates.device, self.name),
            notes=(*dispute_notes(gates, dispute), _PADDED, *bias_notes(gates.request)),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """The weight in contiguous memory, after one product with zeros, for which it compiles.

        Raises BackendError if FlashInfer cannot be imported or does not build.
        """
        check_form(weight, offer.weight)
        weight = contiguous(weight)
        run_once(self.bind(weight, offer), weight, offer, (M_MULTIPLE,))
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """By one Triton kernel, straight into the layout that the kernel reads."""
        from blockscale.kernels.triton.quantize import quantize_rows

        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """One call; a bias is added by a second kernel, after rounding."""
        import torch

        gemm = partial(function_named("gemm_fp8_nt_groupwise"), **self._call)

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            m = out.shape[0]
            rows = round_up(m, M_MULTIPLE)
            codes, scales = activation.data, activation.scales
            target = out
            if rows != m:
                codes, scales = _padded(codes, scales, rows - m)
                target = torch.empty((rows, out.shape[1]), dtype=out.dtype, device=out.device)
            gemm(codes, weight.data, scales, weight.scales, out=target)
            if rows != m:
                out.copy_(target[:m])
            if bias is not None:
                out.add_(bias)

        return multiply


def _padded(
    codes: torch.Tensor, scales: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """So many rows more: of zero codes, with scales that are zero too."""
    import torch
    from torch.nn.functional import pad

    longer = pad(codes.view(torch.uint8), (0, 0, 0, rows)).view(codes.dtype)
    return longer, pad(scales, (0, rows))


class FlashInferTrtllm(_Groupwise):
    """``gemm_fp8_nt_groupwise(backend="trtllm")``."""

    name = "flashinfer_trtllm"
    _call: ClassVar[dict[str, str | None]] = {"backend": "trtllm", "scale_major_mode": None}

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
            "probe has not proven it here"
            if request.out_dtype is DType.FLOAT16
            else "",
        )
        gates.multiples(128, 128, "scales of partial blocks are not documented")
        gates.unless(
            request.k >= TRTLLM_MIN_K, Obstacle.ALIGNMENT, f"K={request.k} is below {TRTLLM_MIN_K}"
        )
        gates.whole_blocks()
        gates.dense()
        return gates.rejections or self._offer(gates, _TRTLLM_DISPUTE)


class FlashInferCutlass(_Groupwise):
    """``gemm_fp8_nt_groupwise(backend="cutlass")``."""

    name = "flashinfer_cutlass"
    _call: ClassVar[dict[str, str | None]] = {"backend": "cutlass", "scale_major_mode": "MN"}

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
        return gates.rejections or self._offer(gates, _CUTLASS_DISPUTE)
