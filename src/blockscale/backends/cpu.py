"""blockscale's own CPU kernel (C++, built at prepare): weight-only, activations are not quantized.

Architectures: any CPU with a C++ compiler; vectorized by hand for AVX2, by the compiler elsewhere.
Blocks: any, float32 scales (UE8M0 is restated, exactly). In and out: bfloat16, float16, float32.
Scales lie as stored, K-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import UNPADDED, Gates
from blockscale.errors import BackendError, FormatError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.planning.decision import Evidence, Obstacle, Offer, OperandForm, Readiness
from blockscale.planning.device import Installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

# How a Device says that a C++ compiler was found (probe.py); its version is the path.
COMPILER = "c++"
NAN_CODE = 0x7F
# Codes that are looked through at a time: a stack of experts may be most of the memory there is.
BAND_ELEMENTS = 4 << 20


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
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            OperandForm(request.format.with_scale(ScaleFormat.FP32), K_MAJOR),
            None,
            evidence=Evidence.TESTED,
            readiness=Readiness.RUNNABLE,
            notes=("weight-only: activations are not quantized",),
            rows=() if request.experts is None else (UNPADDED,),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight as it is, after building the kernel and refusing NaN codes.

        Raises BackendError without a compiler or on another device, FormatError if a code is NaN.
        """
        from blockscale.kernels.cpu.build import library

        library()
        if weight.device.type != "cpu":
            msg = f"the weight is on {weight.device}, but cpu runs on CPUs; plan for that device"
            raise BackendError(msg)
        if _holds_nan(weight.data):
            msg = (
                "the weight holds NaN codes; repair it, or quantize it again from the float weights"
            )
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

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """As ``bind``, for each expert that has rows."""
        from blockscale.kernels.cpu.grouped import GroupedWeightOnlyProduct

        block = weight.format.block
        return GroupedWeightOnlyProduct(weight.data, weight.scales, (block.mn, block.k))


def _holds_nan(data: torch.Tensor) -> bool:
    import torch

    codes = data.view(torch.uint8)
    rows = max(1, BAND_ELEMENTS // codes.shape[-1])
    matrices = codes if codes.ndim > 2 else [codes]  # noqa: PLR2004 - a matrix has two axes
    return any(
        bool(((band & NAN_CODE) == NAN_CODE).any())
        for matrix in matrices
        for band in matrix.split(rows)
    )
