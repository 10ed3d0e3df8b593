"""Warp-specialised Hopper GEMM in Gluon, blockscale's own: DeepGEMM's contract, any output dtype.

Architectures: SM90. Output: bfloat16, float16, float32; fused bias. Experts in both arrangements.
Blocks: weights 128x128, activations 1x128, float32 scales, ceil(K / 128) of them.
Scales lie as DeepGEMM's on SM90: weights as stored, activations MN-major and TMA-aligned.
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
from blockscale.planning.decision import Evidence, Obstacle, Offer, Readiness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.kernels.gluon.grouped_product import GroupedProduct
    from blockscale.kernels.step import Steps
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

PACKAGE = "triton"
# Warpgroup MMA (wgmma) exists on SM90 only (PTX ISA).
ARCHITECTURES = ((9, 0),)
# The first release whose Gluon has TMA, mbarriers and warpgroup_mma.
FIRST_TRITON = (3, 6)
# Experts whose row counts one warp holds (``kernels.gluon.grouped_work``).
MAX_EXPERTS = 512
# Rows of a row block, and up to how many tokens an expert: with 8 experts a token, half of such a
# block is full then. Estimates; every alignment is right for any number of tokens.
ALIGNMENTS = ((8, 0.5), (16, 1), (64, 8), (128, None))


class Gluon:
    """The Gluon kernels.

    A kernel is compiled when the first call needs it, one for each tile and output dtype, some
    seconds in all; Triton keeps it on disk. Run a layer once before capturing it in a CUDA graph.
    """

    name = "gluon"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(ARCHITECTURES)
        gates.package(PACKAGE)
        gates.package_at_least(PACKAGE, *FIRST_TRITON)
        hopper_gates(gates)
        gates.unless(
            request.experts is None or request.experts <= MAX_EXPERTS,
            Obstacle.GROUPING,
            f"serves up to {MAX_EXPERTS} experts on one GPU, not {request.experts}",
        )
        gates.no_bias_of_experts()
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            HOPPER_WEIGHT,
            HOPPER_ACTIVATION,
            evidence=Evidence.TESTED,
            readiness=Readiness.RUNNABLE,
            rows=() if request.experts is None else row_blocks(request.experts, ALIGNMENTS),
        )

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float | None:
        """As an H100 ran them; None below the fewest tokens, and for experts' float32 results."""
        from blockscale.kernels import grouped_times
        from blockscale.kernels.calibration import gluon_us

        if request.experts is not None:
            shape = (request.n, request.k)
            return grouped_times.gluon_us(m, request.experts, shape, request.out_dtype)
        processors = device.sm_count or SM_COUNT
        return gluon_us(m, request.n, request.k, request.out_dtype, processors)

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """The weight as it is, after making sure that TMA can read it and Gluon can be imported.

        Raises BackendError otherwise.
        """
        _import_kernels()
        check_tma_weight(weight, offer)
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """Quantize by blockscale's own Triton kernel, straight into the layout of TMA."""
        from blockscale.kernels.triton.quantize import quantize_rows

        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """Which kernel serves a token count is looked up once for each; see ``kernels/gluon``."""
        from blockscale.kernels.gluon.product import GluonProduct

        return GluonProduct(weight)

    def bind_steps(
        self, weight: BlockScaledTensor, offer: Offer, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Steps:
        """Both kernels launched one after the other, over one allocation."""
        from blockscale.kernels.gluon.product import GluonProduct

        return own_steps(weight, offer, dtypes, GluonProduct(weight))

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """Row blocks of 8, 16, 32 or 64 rows go to the kernel for few rows, of 128 to the other."""
        return _grouped_product(weight).contiguous

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:  # noqa: ARG002 - the protocol's signature
        """``expected_rows`` of 64 or fewer go to the kernel for few rows; slots of any height."""
        return _grouped_product(weight).masked


def _grouped_product(weight: BlockScaledTensor) -> GroupedProduct:
    from blockscale.kernels.gluon.grouped_product import GroupedProduct

    return GroupedProduct(weight)


def _import_kernels() -> None:
    try:
        import blockscale.kernels.gluon.product  # noqa: F401 - the import is the test
    except ImportError as error:
        msg = f"the gluon backend needs Triton {FIRST_TRITON[0]}.{FIRST_TRITON[1]} ({error})"
        raise BackendError(msg) from error
