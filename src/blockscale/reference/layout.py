"""Every scale layout and its inverse: same values, other memory.

Scales pass through here as *codes*: float32 values for FP32, bfloat16 values for BF16, exponent
bytes (uint8) for UE8M0. All functions also work on the meta device.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError
from blockscale.formats import K_MAJOR, BlockFormat, ScaleFormat, ceil_div, round_up
from blockscale.formats.layout import (
    EXPONENTS_PER_WORD,
    SWIZZLE_TILE_COLUMNS,
    SWIZZLE_TILE_ROWS,
    Axes,
    Packing,
    Rows,
)
from blockscale.formats.scale import FLOAT32_MANTISSA_BITS, FLOAT32_MANTISSA_MASK, UE8M0_NAN_BYTE
from blockscale.tensor import BlockScaledTensor, as_stored, torch_dtype

if TYPE_CHECKING:
    from blockscale.formats import BlockShape, ScaleLayout


def relayout(
    tensor: BlockScaledTensor, layout: ScaleLayout, scale: ScaleFormat | None = None
) -> BlockScaledTensor:
    """The same values with their scales stored in ``layout``; ``data`` is shared, not copied.

    ``scale`` restates the scales in another format where that is exact: UE8M0 as FP32 always
    (byte 0 becomes the subnormal 2**-127), FP32 as UE8M0 if every scale is a power of two in
    2**-126 ... 2**127, BF16 as FP32 always. Use ``requantize`` when they are not: no scale is ever
    rounded here.

    Raises FormatError if a scale cannot be restated exactly, or the layout cannot hold the format.
    """
    target = tensor.format if scale is None else tensor.format.with_scale(scale)
    codes = restate(scale_codes(tensor), tensor.format.scale, target.scale)
    return BlockScaledTensor(
        tensor.data, store_codes(codes, tensor.mn, tensor.k, target, layout), target, layout
    )


def refine(tensor: BlockScaledTensor, block: BlockShape) -> BlockScaledTensor:
    """The same values with smaller blocks: each scale is repeated, nothing is rounded.

    The result is in ``K_MAJOR``. Raises FormatError unless the old block is a whole multiple of the
    new one along both axes.
    """
    old = tensor.format.block
    if old.mn % block.mn or old.k % block.k:
        msg = f"blocks of {old} cannot be refined to {block}: not a whole number of new blocks"
        raise FormatError(msg)
    rows, columns = block.grid(tensor.mn, tensor.k)
    codes = scale_codes(tensor)
    codes = codes.repeat_interleave(old.mn // block.mn, -2)[..., :rows, :]
    codes = codes.repeat_interleave(old.k // block.k, -1)[..., :columns]
    target = BlockFormat(tensor.format.element, tensor.format.scale, block)
    scales = store_codes(codes, tensor.mn, tensor.k, target, K_MAJOR)
    return BlockScaledTensor(tensor.data, scales, target, K_MAJOR)


def scale_values(tensor: BlockScaledTensor) -> torch.Tensor:
    """The logical scales as float32, (..., ceil(mn / block.mn), ceil(k / block.k))."""
    return restate(scale_codes(tensor), tensor.format.scale, ScaleFormat.FP32)


def scale_codes(tensor: BlockScaledTensor) -> torch.Tensor:
    """The logical grid of scale codes that a layout stores: the inverse of ``store_codes``.

    Raises FormatError if a layout that repeats scales holds rows that differ within a block.
    """
    fmt, layout = tensor.format, tensor.layout
    rows, columns = layout.grid(tensor.mn, tensor.k, fmt)
    if layout.packing is Packing.SWIZZLED_32_4_4:
        codes = _unswizzled(_as_codes(tensor.scales, fmt.scale), rows, columns)
    else:
        stored = tensor.scales
        if layout.axes is Axes.K_MN:
            stored = stored.transpose(-1, -2)
        if layout.packing is Packing.FOUR_IN_INT32:
            codes = _unpacked(stored[..., :rows, :])[..., :columns]
        else:
            codes = _as_codes(stored[..., :rows, :columns], fmt.scale)
    return _one_row_per_block(codes, tensor) if layout.rows is Rows.PER_ROW else codes


def store_codes(
    codes: torch.Tensor, mn: int, k: int, fmt: BlockFormat, layout: ScaleLayout
) -> torch.Tensor:
    """A new buffer with the scales of an (mn, k) matrix in ``layout``; padding is zero bytes.

    ``codes``: (..., ceil(mn / block.mn), ceil(k / block.k)), in the code type of ``fmt.scale``.
    """
    stored = layout.stored(mn, k, fmt)
    leading = tuple(codes.shape[:-2])
    if layout.rows is Rows.PER_ROW:
        codes = codes.repeat_interleave(fmt.block.mn, -2)[..., :mn, :]
    if layout.packing is Packing.SWIZZLED_32_4_4:
        flat = _swizzled(codes).reshape(-1)
        return as_stored(flat.view(torch_dtype(stored.dtype)), stored, leading)
    if layout.packing is Packing.FOUR_IN_INT32:
        codes = _packed(codes)
    flat = torch.zeros(prod(leading) * stored.elements, dtype=codes.dtype, device=codes.device)
    buffer = as_stored(flat, stored, leading)
    target = buffer.transpose(-1, -2) if layout.axes is Axes.K_MN else buffer
    target[..., : codes.shape[-2], : codes.shape[-1]] = codes
    return as_stored(flat.view(torch_dtype(stored.dtype)), stored, leading)


def restate(codes: torch.Tensor, source: ScaleFormat, target: ScaleFormat) -> torch.Tensor:
    """Scale codes in another scale format, where that is exact. Raises FormatError where not."""
    if source is target:
        return codes
    if target is ScaleFormat.FP32:
        return codes.float() if source is ScaleFormat.BF16 else _bytes_to_float32(codes)
    if target is ScaleFormat.UE8M0:
        return _float32_to_bytes(codes.float())
    msg = f"{target.value} scales are read, never produced"
    raise FormatError(msg)


def _bytes_to_float32(codes: torch.Tensor) -> torch.Tensor:
    bits = codes.to(torch.int32) << FLOAT32_MANTISSA_BITS
    # Byte 0 is 2**-127, whose float32 is the subnormal with the top mantissa bit set.
    bits = torch.where(codes == 0, 1 << (FLOAT32_MANTISSA_BITS - 1), bits)
    # Byte 255 is NaN; exponent 255 with an empty mantissa would be infinity.
    bits = torch.where(codes == UE8M0_NAN_BYTE, 0x7FC00000, bits)
    return bits.view(torch.float32)


def _float32_to_bytes(values: torch.Tensor) -> torch.Tensor:
    bits = values.contiguous().view(torch.int32)
    exponent = bits >> FLOAT32_MANTISSA_BITS  # Negative for negative scales, 255 for NaN and inf.
    exact = (exponent >= 1) & (exponent < UE8M0_NAN_BYTE) & (bits & FLOAT32_MANTISSA_MASK == 0)
    if not values.is_meta and not bool(exact.all()):
        count = int((~exact).sum())
        example = float(values[~exact][0])
        msg = (
            f"{count} of {values.numel()} scales (the first is {example!r}) are not powers of two "
            "that UE8M0 holds; requantize the tensor, or keep FP32 scales"
        )
        raise FormatError(msg)
    return exponent.to(torch.uint8)


def _as_codes(stored: torch.Tensor, scale: ScaleFormat) -> torch.Tensor:
    return stored.view(torch.uint8) if scale is ScaleFormat.UE8M0 else stored


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Exponent bytes, four along k to one int32, lowest byte first, missing ones zero."""
    *leading, rows, columns = codes.shape
    words = ceil_div(columns, EXPONENTS_PER_WORD)
    padded = codes.new_zeros((*leading, rows, words, EXPONENTS_PER_WORD), dtype=torch.int32)
    padded.flatten(-2)[..., :columns] = codes.to(torch.int32)
    low, second, third, high = padded.unbind(-1)
    return low | second << 8 | third << 16 | high << 24


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8).flatten(-2)


def _swizzled(codes: torch.Tensor) -> torch.Tensor:
    """128x4 tiles; inside one, row r and column c lie at (r % 32) * 16 + (r // 32) * 4 + c.

    Source of the order: cuBLAS documentation, "1D block scaling factors layout".
    """
    *leading, rows, columns = codes.shape
    tile_rows, tile_columns = SWIZZLE_TILE_ROWS, SWIZZLE_TILE_COLUMNS
    shape = (*leading, round_up(rows, tile_rows), round_up(columns, tile_columns))
    padded = codes.new_zeros(shape)
    padded[..., :rows, :columns] = codes
    tiles = padded.reshape(
        *leading, shape[-2] // tile_rows, 4, 32, shape[-1] // tile_columns, tile_columns
    )
    return tiles.movedim(-2, -4).transpose(-2, -3).reshape(*leading, -1)


def _unswizzled(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    leading = flat.shape[:-1]
    row_tiles = round_up(rows, SWIZZLE_TILE_ROWS) // SWIZZLE_TILE_ROWS
    column_tiles = round_up(columns, SWIZZLE_TILE_COLUMNS) // SWIZZLE_TILE_COLUMNS
    tiles = flat.reshape(*leading, row_tiles, column_tiles, 32, 4, SWIZZLE_TILE_COLUMNS)
    padded = tiles.transpose(-2, -3).movedim(-4, -2)
    shape = (row_tiles * SWIZZLE_TILE_ROWS, column_tiles * SWIZZLE_TILE_COLUMNS)
    return padded.reshape(*leading, *shape)[..., :rows, :columns]


def _one_row_per_block(codes: torch.Tensor, tensor: BlockScaledTensor) -> torch.Tensor:
    block = tensor.format.block
    kept = codes[..., :: block.mn, :]
    repeated = kept.repeat_interleave(block.mn, -2)[..., : tensor.mn, :]
    if not codes.is_meta and not torch.equal(repeated, codes):
        msg = f"rows of one {block} block carry different scales in layout {tensor.layout}"
        raise FormatError(msg)
    return kept
