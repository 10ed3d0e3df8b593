"""cuBLASLt's block-scaled GEMMs through ``torch.nn.functional.scaled_mm``.

Architectures: SM90 with CUDA 12.9, SM100/SM103 with CUDA 12.8. Output: bfloat16, float16, float32.
Blocks: SM90 weights 128x128, activations 1x128, float32 scales; SM100 MXFP8 (1x32 UE8M0) for both.
SM90: weight scales with K blocks padded to four (L4), activations MN-major; SM100: swizzled 32x4x4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR_PADDED_TRANSPOSED,
    MN_MAJOR,
    MXFP8,
    SWIZZLED_32_4_4,
    BlockShape,
    DType,
    ScaleFormat,
)
from blockscale.planning.decision import Obstacle, Offer, OperandForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest


@dataclass(frozen=True, slots=True)
class Recipe:
    """What scaled_mm takes on one family of GPUs. ``scales``: of the checkpoint, None for any."""

    weight: OperandForm
    activation: OperandForm
    blocks: tuple[BlockShape, ...]
    scales: ScaleFormat | None
    cuda: tuple[int, int]
    k_multiple: int
    note: str


# ATen/native/cuda/ScaledBlas.cpp: block recipes need compute capability 9.0 and cuBLASLt 12.9.
# torch asks for K % 16 only; with K % 128 != 0 it takes a padded scale, but nobody compared the
# numbers (baseline/h200.md), and wrong scales were once accepted in silence (pytorch #166752).
_BLOCKWISE = Recipe(
    OperandForm(FP8_128X128_FP32, K_MAJOR_PADDED_TRANSPOSED),
    OperandForm(FP8_1X128_FP32, MN_MAJOR),
    (BlockShape(128, 128),),
    None,
    (12, 9),
    128,
    "M is padded to a multiple of four",
)
# facts/peers.md 2.2, torch MXFP8: UE8M0 scales of larger blocks are served by repetition. Float32
# scales are left alone: only DeepGEMM makes converting them worth it (design 6).
_MXFP8 = Recipe(
    OperandForm(MXFP8, SWIZZLED_32_4_4),
    OperandForm(MXFP8, SWIZZLED_32_4_4),
    (BlockShape(128, 128), BlockShape(32, 32), BlockShape(1, 128), BlockShape(1, 32)),
    ScaleFormat.UE8M0,
    (12, 8),
    32,
    "activations are quantized in blocks of 1x32, finer than the checkpoint's recipe may say",
)
RECIPES = {(9, 0): _BLOCKWISE, (10, 0): _MXFP8, (10, 3): _MXFP8}

# at::_scaled_mm: trailing dimensions are multiples of 16 (seen on an H200 with N = 200).
N_MULTIPLE = 16


class TorchScaledMm:
    """The gates and forms of torch's block-scaled matmuls."""

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
            notes=(recipe.note, *bias_notes(request)),
        )
