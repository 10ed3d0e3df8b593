"""blockscale's own CPU kernel (C++, built at prepare): weight-only, activations are not quantized.

Architectures: any CPU with a C++ compiler; vectorized by hand for AVX2, by the compiler elsewhere.
Blocks: any, float32 scales (UE8M0 is restated, exactly). In and out: bfloat16, float16, float32.
Scales lie as stored, K-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates
from blockscale.errors import FormatError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.planning.decision import Evidence, Obstacle, Offer, OperandForm, Readiness
from blockscale.planning.device import Installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

# How a Device says that a C++ compiler was found (probe.py); its version is the path.
COMPILER = "c++"
NAN_CODE = 0x7F


class Cpu:
    """The fast CPU path: FP8 weights at half the bytes of bfloat16, float32 sums."""

    name = "cpu"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer on any CPU with a compiler."""
        gates = Gates(self.name, request, device)
        gates.unless(
            device.is_cpu, Obstacle.ARCHITECTURE, f"runs on CPUs, not on {device.architecture}"
        )
        gates.unless(
            device.installed(COMPILER) is not Installed.NO,
            Obstacle.NOT_INSTALLED,
            "needs a C++ compiler (apt install g++)",
        )
        gates.unless(
            request.activation_dtype is request.out_dtype,
            Obstacle.OUT_DTYPE,
            f"writes the activation's dtype, {request.activation_dtype.value}",
        )
        gates.whole_blocks()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(request.format.with_scale(ScaleFormat.FP32), K_MAJOR),
            None,
            evidence=Evidence.TESTED,
            readiness=Readiness.RUNNABLE if request.experts is None else Readiness.PLAN_ONLY,
            notes=("weight-only: activations are not quantized",),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight as it is, after building the kernel and refusing NaN codes.

        Raises BackendError without a compiler, FormatError if a code is NaN.
        """
        import torch

        from blockscale.kernels.cpu.build import library

        library()
        codes = weight.data.view(torch.uint8)
        if bool(((codes & NAN_CODE) == NAN_CODE).any()):
            msg = "the weight holds NaN codes; find the layer with `blockscale verify`"
            raise FormatError(msg)
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """Never called: ``Offer.activation`` is None."""
        msg = "the cpu backend takes unquantized activations"
        raise FormatError(msg)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """Decode on the fly for few tokens, tile by tile for many."""
        from blockscale.kernels.cpu.product import WeightOnlyProduct

        block = weight.format.block
        return WeightOnlyProduct(weight.data, weight.scales, (block.mn, block.k))
