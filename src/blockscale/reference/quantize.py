"""Float to block-scaled and back: the one quantization rule.

For each block, in float32 with IEEE rounding::

    amax  = max(max |x|, AMAX_FLOOR)
    scale = amax / 448                      UE8M0: rounded up to a power of two, on its bits
    data  = clamp(x / scale, -448, 448)     rounded to nearest even by the cast to E4M3FN

A true division, not a multiplication by a reciprocal: they differ in the last bit of some codes,
and this is the one that every kernel of this package must reproduce. A NaN in a block makes its
scale NaN, so it is seen rather than hidden; so does an infinity where the scale format has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from blockscale.errors import FormatError
from blockscale.formats import AMAX_FLOOR, K_MAJOR, ScaleFormat, round_up
from blockscale.formats.scale import (
    FLOAT32_MANTISSA_BITS,
    FLOAT32_MANTISSA_MASK,
    UE8M0_MAX_BYTE,
    UE8M0_MIN_BYTE,
    UE8M0_NAN_BYTE,
)
from blockscale.reference.layout import restate, scale_values, store_codes
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat, BlockShape


def quantize(values: torch.Tensor, fmt: BlockFormat) -> BlockScaledTensor:
    """Express float ``values`` (..., mn, k) in ``fmt``, scales in ``K_MAJOR``.

    Partial blocks at the edges use their real elements only. Guarantees: a block of zeros gives
    zeros; no code is NaN unless its input or its block's scale is; the relative step is that of
    E4M3FN under a scale at most twice the smallest possible. Rounding has no gradient: the result
    is detached from the graph of ``values``.

    Raises FormatError if ``values`` is no matrix of floats, or ``fmt`` has BF16 scales.
    """
    if values.ndim < 2:  # noqa: PLR2004 - a matrix has two axes
        msg = f"values have shape {tuple(values.shape)}; at least two axes (mn, k) are needed"
        raise FormatError(msg)
    if not values.is_floating_point():
        msg = f"only floating-point tensors can be quantized, not {values.dtype}"
        raise FormatError(msg)
    if fmt.scale is ScaleFormat.BF16:
        msg = "BF16 scales are read from checkpoints, never produced; quantize to FP32 or UE8M0"
        raise FormatError(msg)
    values = values.detach()
    codes = codes_of_amax(block_amax(values, fmt.block), fmt)
    scale = _spread(restate(codes, fmt.scale, ScaleFormat.FP32), fmt.block, values)
    largest = fmt.element.max
    data = (values.float() / scale).clamp(-largest, largest).to(torch_dtype(fmt.element))
    data = data.contiguous()  # A transposed input would hand its strides on.
    mn, k = values.shape[-2:]
    return BlockScaledTensor(data, store_codes(codes, mn, k, fmt, K_MAJOR), fmt, K_MAJOR)


def dequantize(tensor: BlockScaledTensor) -> torch.Tensor:
    """The float32 values (..., mn, k): data x scale, one rounding each (none for UE8M0)."""
    return tensor.data.float() * _spread(scale_values(tensor), tensor.format.block, tensor.data)


def block_amax(values: torch.Tensor, block: BlockShape) -> torch.Tensor:
    """The largest magnitude of each block as float32, (..., ceil(mn / mn), ceil(k / k)).

    NaN if the block holds one.
    """
    mn, k = values.shape[-2:]
    rows, columns = block.grid(mn, k)
    magnitudes = pad(
        values.abs().float(), (0, round_up(k, block.k) - k, 0, round_up(mn, block.mn) - mn)
    )
    tiles = magnitudes.reshape(*values.shape[:-2], rows, block.mn, columns, block.k)
    return tiles.amax(dim=(-3, -1))


def round_up_to_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """UE8M0 bytes (uint8) of float32 scales, rounded up on their bits, kept within [1, 254].

    NaN, infinity and anything above 2**127 give 255, NaN. See ``formats.scale``.
    """
    bits = scale.contiguous().view(torch.int32)
    exponent = bits >> FLOAT32_MANTISSA_BITS
    exponent = exponent + (bits & FLOAT32_MANTISSA_MASK != 0).to(torch.int32)
    unrepresentable = (exponent > UE8M0_MAX_BYTE) | ~torch.isfinite(scale)
    exponent = exponent.clamp(UE8M0_MIN_BYTE, UE8M0_MAX_BYTE)
    return torch.where(unrepresentable, UE8M0_NAN_BYTE, exponent).to(torch.uint8)


def codes_of_amax(amax: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Scales of blocks whose largest magnitudes (float32) are ``amax``, as ``fmt`` stores them."""
    # clamp keeps NaN; the floor is the float32 nearest to AMAX_FLOOR.
    floored = amax.clamp(min=AMAX_FLOOR)
    # By a tensor: torch's CUDA kernel turns a division by a number into a multiplication by its
    # reciprocal, which gives other bits (H200, torch 2.11, 2026-11-23: in one scale of seven).
    scale = floored / torch.full_like(floored, fmt.element.max)
    return round_up_to_ue8m0(scale) if fmt.scale is ScaleFormat.UE8M0 else scale


def _spread(scales: torch.Tensor, block: BlockShape, like: torch.Tensor) -> torch.Tensor:
    """One scale per element: rows and columns repeated over their block, cropped to the matrix."""
    mn, k = like.shape[-2:]
    rows = scales.repeat_interleave(block.mn, -2)[..., :mn, :]
    return rows.repeat_interleave(block.k, -1)[..., :k]
