"""Plain torch: dequantize both operands, multiply in float32. Slow, exact semantics, anywhere.

Architectures: all, CPU included. Output: bfloat16, float16, float32; bias added in float32.
Blocks: any weights; activations are quantized per token with the weight's K block.
Scales lie as stored, K-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import UNPADDED, Gates
from blockscale.formats import E4M3FN, K_MAJOR, BlockFormat, BlockShape, ScaleFormat
from blockscale.planning.decision import Evidence, Offer, OperandForm, Readiness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor


class Reference:
    """The definition of correct, as a backend."""

    name = "reference"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, unless the shard cuts through a scale block."""
        gates = Gates(self.name, request, device)
        gates.whole_blocks()
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        weight = request.format
        if weight.scale is ScaleFormat.BF16:
            weight = weight.with_scale(ScaleFormat.FP32)
        activation = BlockFormat(E4M3FN, weight.scale, BlockShape(1, weight.block.k))
        return Offer(
            self.name,
            OperandForm(weight, K_MAJOR),
            OperandForm(activation, K_MAJOR),
            evidence=Evidence.TESTED,
            readiness=Readiness.RUNNABLE,
            notes=("slow: dequantizes the weight on every call",),
            rows=() if request.experts is None else (UNPADDED,),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight as it is: nothing is compiled and the layout is the checkpoint's."""
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """Per-token blocks by ``reference.quantize``."""
        from blockscale.reference import quantize

        assert offer.activation is not None
        return quantize(activation, offer.activation.format)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """``reference.block_scaled_matmul`` in float32, then the bias, then one cast."""
        from blockscale.reference import block_scaled_matmul

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            result = block_scaled_matmul(activation, weight)
            out.copy_(result if bias is None else result + bias.float())

        return multiply

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """``reference.contiguous_matmul`` in float32, then one cast. The host reads ``groups``."""
        from blockscale.reference import contiguous_matmul

        def multiply(
            activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
        ) -> None:
            out.copy_(contiguous_matmul(activation, weight, groups))

        return multiply

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:  # noqa: ARG002 - the protocol's signature
        """``reference.masked_matmul`` in float32, then one cast. The host reads ``counts``."""
        from blockscale.reference import masked_matmul

        def multiply(
            activation: BlockScaledTensor,
            counts: torch.Tensor,
            out: torch.Tensor,
            expected_rows: int,  # noqa: ARG001 - the protocol's signature
        ) -> None:
            out.copy_(masked_matmul(activation, weight, counts))

        return multiply
