"""cuBLASLt's block-scaled GEMMs through ``torch.nn.functional.scaled_mm``.

Architectures: SM90 with CUDA 12.9, SM100/SM103 with CUDA 12.8. Output: bfloat16, float16, float32.
Blocks: SM90 weights 128x128, activations 1x128, float32 scales; SM100 MXFP8 (1x32 UE8M0) for both.
SM90: weight scales with K blocks padded to four (L4), activations MN-major, TMA-aligned; SM100:
swizzled 32x4x4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR_PADDED_TRANSPOSED,
    MN_MAJOR_TMA_ALIGNED,
    MXFP8,
    SWIZZLED_32_4_4,
    BlockShape,
    DType,
    ScaleFormat,
    round_up,
)
from blockscale.planning.decision import Evidence, Obstacle, Offer, OperandForm, Readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from blockscale.backends.base import Multiply
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """What scaled_mm takes on one family of GPUs. ``scales``: of the checkpoint, None for any."""

    weight: OperandForm
    activation: OperandForm
    blocks: tuple[BlockShape, ...]
    scales: ScaleFormat | None
    cuda: tuple[int, int]
    k_multiple: int
    evidence: Evidence
    readiness: Readiness
    note: str


# ATen/native/cuda/ScaledBlas.cpp: block recipes need compute capability 9.0 and cuBLASLt 12.9.
# torch asks for K % 16 only; with K % 128 != 0 it takes a padded scale, but nobody compared the
# numbers, and wrong scales were once accepted in silence (pytorch #166752).
_BLOCKWISE = Recipe(
    OperandForm(FP8_128X128_FP32, K_MAJOR_PADDED_TRANSPOSED),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    (BlockShape(128, 128),),
    None,
    (12, 9),
    128,
    Evidence.TESTED,
    Readiness.RUNNABLE,
    "M is padded to a multiple of four, which costs a copy of the result where it is none",
)
# torch's MXFP8 recipe: UE8M0 scales of larger blocks are served by repetition. Float32 scales are
# left alone: only DeepGEMM makes converting them worth it (docs/concepts.md).
_MXFP8 = Recipe(
    OperandForm(MXFP8, SWIZZLED_32_4_4),
    OperandForm(MXFP8, SWIZZLED_32_4_4),
    (BlockShape(128, 128), BlockShape(32, 32), BlockShape(1, 128), BlockShape(1, 32)),
    ScaleFormat.UE8M0,
    (12, 8),
    32,
    Evidence.DOCUMENTED,
    Readiness.PLAN_ONLY,
    "activations are quantized in blocks of 1x32, finer than the checkpoint's recipe may say",
)
RECIPES = {(9, 0): _BLOCKWISE, (10, 0): _MXFP8, (10, 3): _MXFP8}

# at::_scaled_mm: trailing dimensions are multiples of 16 (seen on an H200 with N = 200).
N_MULTIPLE = 16
# Rows of A: cuBLASLt reads scales of A in columns that start on 16 bytes, and torch wants their
# stride to be M exactly (seen on an H200 with M = 1).
M_MULTIPLE = 4


class TorchScaledMm:
    """torch's block-scaled matmuls: run on SM90, planned on SM100."""

    name = "torch_scaled_mm"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(RECIPES)
        gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
        gates.whole_blocks()
        gates.dense()
        recipe = RECIPES.get(device.capability) if device.capability is not None else None
        if recipe is None:
            return gates.rejections
        gates.cuda_at_least(*recipe.cuda)
        gates.blocks(recipe.blocks)
        gates.unless(
            recipe.scales in (None, request.format.scale),
            Obstacle.SCALE_FORMAT,
            f"its recipe on {device.architecture} is MXFP8, for checkpoints with UE8M0 scales, not "
            f"{request.format.scale.value}",
        )
        gates.multiples(N_MULTIPLE, recipe.k_multiple)
        if gates.rejections:
            return gates.rejections
        return Offer(
            self.name,
            recipe.weight,
            recipe.activation,
            evidence=recipe.evidence,
            readiness=recipe.readiness,
            notes=(recipe.note, *bias_notes(request)),
        )

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight as it is: nothing is compiled. Raises BackendError if torch is too old."""
        _scaled_mm()
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """By one Triton kernel, with room for zero rows up to a multiple of four."""
        from blockscale.kernels.triton.quantize import quantize_rows

        form = offer.activation
        assert form is not None
        return quantize_rows(activation, form.format, form.layout, row_multiple=M_MULTIPLE)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """One cuBLASLt call; a bias is added by a second kernel, after rounding."""
        import torch

        scaled_mm = _scaled_mm()
        transposed = weight.data.t()

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            m = out.shape[0]
            rows = round_up(m, M_MULTIPLE)
            if rows == m:
                scaled_mm(activation.data, activation.scales, transposed, weight.scales, out)
            else:
                padded = torch.empty((rows, out.shape[1]), dtype=out.dtype, device=out.device)
                codes, scales = _padded(activation, rows)
                scaled_mm(codes, scales, transposed, weight.scales, padded)
                out.copy_(padded[:m])
            if bias is not None:
                out.add_(bias)

        return multiply


def _padded(activation: BlockScaledTensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales with ``rows`` rows; what the last ones hold only reaches dropped results.

    Scales are padded by their layout. So is the storage of codes that ``quantize_activation`` made;
    others are copied.
    """
    import torch
    from torch.nn.functional import pad

    codes, scales = activation.data, activation.scales
    m, k = codes.shape
    room = codes.untyped_storage().nbytes() - codes.storage_offset()
    if codes.stride(0) == k and room >= rows * k:
        codes = codes.as_strided((rows, k), (k, 1))
    else:
        codes = pad(codes.view(torch.uint8), (0, 0, 0, rows - m)).view(codes.dtype)
    return codes, scales.as_strided((rows, scales.shape[1]), (1, rows))


def _scaled_mm() -> Callable[..., None]:
    """(codes, scales, weight^T, weight scales, out) -> None, writing into ``out``."""
    import torch
    from torch.nn import functional

    try:
        of_a = [functional.ScalingType.BlockWise1x128.value]
        of_b = [functional.ScalingType.BlockWise128x128.value]
        plain = [functional.SwizzleType.NO_SWIZZLE.value]
        # torch.nn.functional.scaled_mm is this call without ``out``, so without it every forward
        # would copy its result.
        call = torch._scaled_mm_v2  # noqa: SLF001 - as above
    except AttributeError as error:
        msg = f"torch {torch.__version__} has no block-scaled matmul; 2.10 and newer have ({error})"
        raise BackendError(msg) from error

    def scaled_mm(
        codes: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        weight_scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        call(
            codes,
            weight,
            [scales],
            of_a,
            plain,
            [weight_scales],
            of_b,
            plain,
            None,
            out.dtype,
            out=out,
        )

    return scaled_mm
