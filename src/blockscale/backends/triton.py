"""Block-scaled GEMM in plain Triton, blockscale's own portable kernel.

Architectures: SM89 and newer (FP8 tensor cores). Output: bfloat16, float16, float32; fused bias.
Blocks: weights 128x128, 64x128 or 32x32, activations one row of that; float32 scales; any N and K.
Scales lie as stored, K-major, for weights, and MN-major, TMA-aligned for activations.
Experts in both arrangements, by one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates
from blockscale.backends.own_kernels import own_steps, row_blocks
from blockscale.errors import BackendError
from blockscale.formats import (
    E4M3FN,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockFormat,
    BlockShape,
    DType,
    ScaleFormat,
)
from blockscale.planning.decision import (
    Evidence,
    Obstacle,
    Offer,
    OperandForm,
    Readiness,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.kernels.step import Steps
    from blockscale.kernels.triton.grouped_product import GroupedTritonProduct
    from blockscale.kernels.triton.product import TritonProduct
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

PACKAGE = "triton"
# PTX ISA: mma with .e4m3 operands needs sm_89.
FIRST_ARCHITECTURE = (8, 9)
# tests/gpu passed on this one; the kernel compiles for the others.
TESTED_ARCHITECTURES = ((9, 0),)
BLOCKS = (BlockShape(128, 128), BlockShape(64, 128), BlockShape(32, 32))
# The kernel is compiled for weights that start on this many bytes.
WEIGHT_ALIGNMENT = 16
# Rows of a row block, and up to how many tokens an expert: with 8 experts a token, half of such a
# block is full then. Estimates; every alignment is right for any number of tokens.
ALIGNMENTS = ((16, 1), (64, 8), (128, None))


class Triton:
    """The plain Triton kernels."""

    name = "triton"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.unless(
            device.capability is not None and device.capability >= FIRST_ARCHITECTURE,
            Obstacle.ARCHITECTURE,
            f"needs FP8 tensor cores (sm_89 or newer), not {device.architecture}",
        )
        gates.package(PACKAGE)
        gates.blocks(BLOCKS)
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
        gates.whole_blocks()
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        is_tested = device.capability in TESTED_ARCHITECTURES
        block = request.format.block
        return Offer(
            self.name,
            OperandForm(BlockFormat(E4M3FN, ScaleFormat.FP32, block), K_MAJOR),
            OperandForm(
                BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(1, block.k)), MN_MAJOR_TMA_ALIGNED
            ),
            evidence=Evidence.TESTED if is_tested else Evidence.DOCUMENTED,
            readiness=Readiness.RUNNABLE,
            rows=() if request.experts is None else row_blocks(request.experts, ALIGNMENTS),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight in aligned, contiguous memory; every kernel that it needs is compiled.

        Some seconds on a machine that never ran such a shape, milliseconds later: Triton keeps
        kernels on disk. Raises BackendError if Triton cannot be imported.
        """
        import torch

        from blockscale.tensor import BlockScaledTensor

        data = weight.data
        if not data.is_contiguous() or data.data_ptr() % WEIGHT_ALIGNMENT:
            data = data.clone(memory_format=torch.contiguous_format)
            weight = BlockScaledTensor(data, weight.scales, weight.format, weight.layout)
        product = _grouped_product(weight) if weight.leading else _product(weight)
        product.compile((torch.bfloat16, torch.float16, torch.float32))
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """By one kernel, straight into the layout of ``offer.activation``."""
        from blockscale.kernels.triton.quantize import quantize_rows

        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """Tiles for every token count, looked up once."""
        return _product(weight)

    def bind_steps(
        self, weight: BlockScaledTensor, offer: Offer, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Steps:
        """Both kernels launched one after the other, over one allocation."""
        return own_steps(weight, offer, dtypes, _product(weight))

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """Row blocks of 16, 64 or 128 rows."""
        return _grouped_product(weight).contiguous

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:  # noqa: ARG002 - the protocol's signature
        """Slots of any height."""
        return _grouped_product(weight).masked


def _product(weight: BlockScaledTensor) -> TritonProduct:
    try:
        from blockscale.kernels.triton.product import TritonProduct
    except ImportError as error:
        msg = f"the triton backend needs Triton (pip install triton): {error}"
        raise BackendError(msg) from error
    return TritonProduct(weight)


def _grouped_product(weight: BlockScaledTensor) -> GroupedTritonProduct:
    try:
        from blockscale.kernels.triton.grouped_product import GroupedTritonProduct
    except ImportError as error:
        msg = f"the triton backend needs Triton (pip install triton): {error}"
        raise BackendError(msg) from error
    return GroupedTritonProduct(weight)
