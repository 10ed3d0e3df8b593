"""What the numbers mean and where they lie: plain values, no torch.

Read ``element`` (one number), ``scale`` (its multiplier and the only rounding rule), ``block``
(who shares a scale), ``block_format`` (the three together), ``layout`` (scales in memory).
"""

from blockscale.formats.block import BlockShape, ceil_div, round_up
from blockscale.formats.block_format import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    NAMED_FORMATS,
    BlockFormat,
    block_format_named,
)
from blockscale.formats.element import E4M3FN, DType, ElementFormat
from blockscale.formats.layout import (
    K_BY_MN,
    K_MAJOR,
    K_MAJOR_PADDED_TRANSPOSED,
    K_MAJOR_TRANSPOSED,
    MN_MAJOR,
    MN_MAJOR_PADDED,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    SCALE_LAYOUTS,
    SWIZZLED_32_4_4,
    ScaleLayout,
    StorageType,
    StoredScales,
    scale_layout_named,
)
from blockscale.formats.scale import (
    AMAX_FLOOR,
    PowerOfTwo,
    ScaleFormat,
    is_ue8m0_exact,
    ue8m0_byte_rounded_up,
    ue8m0_value,
)

__all__ = [
    "AMAX_FLOOR",
    "E4M3FN",
    "FP8_1X128_FP32",
    "FP8_1X128_UE8M0",
    "FP8_32X32_UE8M0",
    "FP8_128X128_FP32",
    "FP8_128X128_UE8M0",
    "K_BY_MN",
    "K_MAJOR",
    "K_MAJOR_PADDED_TRANSPOSED",
    "K_MAJOR_TRANSPOSED",
    "MN_MAJOR",
    "MN_MAJOR_PADDED",
    "MN_MAJOR_TMA_ALIGNED",
    "MN_MAJOR_TMA_ALIGNED_PACKED",
    "MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW",
    "MXFP8",
    "NAMED_FORMATS",
    "SCALE_LAYOUTS",
    "SWIZZLED_32_4_4",
    "BlockFormat",
    "BlockShape",
    "DType",
    "ElementFormat",
    "PowerOfTwo",
    "ScaleFormat",
    "ScaleLayout",
    "StorageType",
    "StoredScales",
    "block_format_named",
    "ceil_div",
    "is_ue8m0_exact",
    "round_up",
    "scale_layout_named",
    "ue8m0_byte_rounded_up",
    "ue8m0_value",
]
