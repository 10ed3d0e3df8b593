"""Two backends of a package of its own: one that runs on a CPU, one that is only planned yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import UNPADDED, Gates
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    BlockShape,
    DType,
    ScaleFormat,
)
from blockscale.planning.decision import Obstacle, Offer, OperandForm, Readiness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale import BlockScaledTensor, Device, LinearRequest
    from blockscale.backends.base import Multiply, MultiplyContiguous
    from blockscale.planning.decision import Rejection


class MyMatmul:
    """torch's matmul on weights that every call dequantizes; activations are not quantized."""

    name = "my_matmul"
    packages = ("torch",)

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """Every reason against a layer, or what would be read if it came here."""
        gates = Gates(self.name, request, device)
        gates.unless(
            device.is_cpu, Obstacle.ARCHITECTURE, f"runs on CPUs, not on {device.architecture}"
        )
        gates.whole_blocks()
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            weight=OperandForm(request.format.with_scale(ScaleFormat.FP32), K_MAJOR),
            activation=None,
            readiness=Readiness.RUNNABLE,
            rows=() if request.experts is None else (UNPADDED,),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """Once, at load: what the kernel needs is built here. This one needs nothing."""
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """Never called: the offer's activation is None."""
        raise NotImplementedError

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        """The hot call: what can be looked up once is looked up before it is made."""
        from blockscale.reference import dequantize

        def multiply(
            activation: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            product = activation.float() @ dequantize(weight).T
            out.copy_(product if bias is None else product + bias.float())

        return multiply

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:
        """All experts in one call; ``groups`` has the expert of each row, or -1."""
        from blockscale.reference import dequantize, expert_of

        def multiply(activation: torch.Tensor, groups: torch.Tensor, out: torch.Tensor) -> None:
            for expert in range(weight.leading[0]):
                rows = groups == expert
                product = activation[rows].float() @ dequantize(expert_of(weight, expert)).T
                out[rows] = product.to(out.dtype)

        return multiply


class MyGemm:
    """A CUDA library of which the gates are known: planned on invented devices, with its notes."""

    name = "my_gemm"
    packages = ("my-cuda-gemm",)

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """Every reason against a layer, or what would be read if it came here."""
        gates = Gates(self.name, request, device)
        gates.architectures(((9, 0),), {(10, 0): "a kernel for it is being written"})
        gates.package("my-cuda-gemm")
        gates.cuda_at_least(12, 4)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.FLOAT16,))
        gates.multiples(64, 128)
        gates.whole_blocks()
        gates.dense()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            weight=OperandForm(FP8_128X128_FP32, K_MAJOR),
            activation=OperandForm(FP8_1X128_FP32, K_MAJOR),
        )
