"""Warp-specialised Hopper GEMM in CUDA C++, blockscale's own, compiled by NVRTC when it is needed.

Architectures: SM90. Output: bfloat16, float16, float32; fused bias. Experts in both arrangements.
Blocks: weights 128x128, activations 1x128, float32 scales, ceil(K / 128) of them.
Scales lie as Gluon's and DeepGEMM's on SM90. Where it serves, and where Gluon: ADR 0010.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates
from blockscale.backends.own_kernels import (
    HOPPER_ACTIVATION,
    HOPPER_WEIGHT,
    SM_COUNT,
    check_tma_weight,
    hopper_gates,
    own_steps,
    row_blocks,
)
from blockscale.errors import BackendError
from blockscale.planning.decision import Evidence, Offer, Readiness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct
    from blockscale.kernels.step import Steps
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

# NVRTC's Python binding; torch's CUDA wheels bring NVRTC itself, and often the binding.
PACKAGE = "cuda-bindings"
# wgmma, and clusters with TMA multicast beside it, exist on SM90 only (PTX ISA).
ARCHITECTURES = ((9, 0),)
# The first NVRTC that knows sm_90a and PTX 8.0.
FIRST_CUDA = (12, 0)
# Rows of a row block, and up to how many tokens an expert: as Gluon's, an estimate.
ALIGNMENTS = ((64, 8), (128, None))


class Cuda:
    """The CUDA C++ kernel.

    A form of it is compiled when the first call needs it, one for each tile and output dtype, one
    or two seconds each; cubins are kept on disk. Run a layer once before capturing it in a CUDA
    graph.
    """

    name = "cuda"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(ARCHITECTURES)
        gates.package(PACKAGE)
        gates.cuda_at_least(*FIRST_CUDA)
        hopper_gates(gates)
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            HOPPER_WEIGHT,
            HOPPER_ACTIVATION,
            # All of tests/gpu passed on an H100 (source 1ce0f8d, 2026-11-26).
            evidence=Evidence.TESTED,
            readiness=Readiness.RUNNABLE,
            rows=() if request.experts is None else row_blocks(request.experts, ALIGNMENTS),
        )

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float | None:
        """As an H100 ran them; None below the fewest tokens, and for experts' float32 results."""
        from blockscale.kernels import grouped_times
        from blockscale.kernels.calibration import cuda_us

        if request.experts is not None:
            shape = (request.n, request.k)
            return grouped_times.cuda_us(m, request.experts, shape, request.out_dtype)
        processors = device.sm_count or SM_COUNT
        return cuda_us(m, request.n, request.k, request.out_dtype, processors)

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """The weight as it is, after making sure that TMA can read it and NVRTC is there.

        Raises BackendError otherwise.
        """
        from blockscale.kernels.cuda.build import nvrtc

        nvrtc()
        check_tma_weight(weight, offer)
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """Quantize by blockscale's own Triton kernel, straight into the layout of TMA.

        Raises BackendError if Triton cannot be imported.
        """
        try:
            from blockscale.kernels.triton.quantize import quantize_rows
        except ImportError as error:
            raise _needs_triton(error) from error
        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind_steps(
        self, weight: BlockScaledTensor, offer: Offer, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Steps:
        """Both kernels launched one after the other, over one allocation."""
        from blockscale.kernels.cuda.product import CudaProduct

        try:
            return own_steps(weight, offer, dtypes, CudaProduct(weight))
        except ImportError as error:
            raise _needs_triton(error) from error

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """Which form serves a token count is looked up once for each; see ``kernels/cuda``."""
        from blockscale.kernels.cuda.product import CudaProduct

        return CudaProduct(weight)

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """Row blocks of 64 or 128 rows; see ``kernels/cuda/grouped_choice``."""
        return _grouped_product(weight).contiguous

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:  # noqa: ARG002 - the protocol's signature
        """Slots of any height; as it stands, for many rows of each."""
        return _grouped_product(weight).masked


def _grouped_product(weight: BlockScaledTensor) -> CudaGroupedProduct:
    from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct

    return CudaGroupedProduct(weight)


def _needs_triton(error: ImportError) -> BackendError:
    msg = f"quantizing activations needs Triton (pip install triton): {error}"
    return BackendError(msg)
