"""A block format: element, scale and block together. New formats are values, not code."""

from __future__ import annotations

from dataclasses import dataclass

from blockscale.errors import FormatError
from blockscale.formats.block import BlockShape
from blockscale.formats.element import E4M3FN, ElementFormat
from blockscale.formats.scale import ScaleFormat


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What the numbers of a block-scaled tensor mean; where they lie is a ``ScaleLayout``."""

    element: ElementFormat
    scale: ScaleFormat
    block: BlockShape

    @property
    def name(self) -> str:
        """``e4m3fn/128x128/fp32``; the inverse is ``block_format_named``."""
        return f"{self.element.name}/{self.block}/{self.scale.value}"

    def with_scale(self, scale: ScaleFormat) -> BlockFormat:
        """The same elements and blocks with another scale format."""
        return BlockFormat(self.element, scale, self.block)

    def __str__(self) -> str:
        """The name."""
        return self.name


FP8_128X128_FP32 = BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(128, 128))
FP8_128X128_UE8M0 = BlockFormat(E4M3FN, ScaleFormat.UE8M0, BlockShape(128, 128))
FP8_1X128_FP32 = BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(1, 128))
FP8_1X128_UE8M0 = BlockFormat(E4M3FN, ScaleFormat.UE8M0, BlockShape(1, 128))
FP8_32X32_UE8M0 = BlockFormat(E4M3FN, ScaleFormat.UE8M0, BlockShape(32, 32))
MXFP8 = BlockFormat(E4M3FN, ScaleFormat.UE8M0, BlockShape(1, 32))

NAMED_FORMATS: tuple[BlockFormat, ...] = (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_32X32_UE8M0,
    MXFP8,
)


def block_format_named(name: str) -> BlockFormat:
    """The inverse of ``BlockFormat.name``. Raises FormatError if ``name`` is malformed."""
    try:
        element, block, scale = name.split("/")
        mn, k = block.split("x")
        known = _ELEMENTS[element]
        return BlockFormat(known, ScaleFormat(scale), BlockShape(int(mn), int(k)))
    except (KeyError, ValueError):
        msg = f"{name!r} is no block format; write it like {FP8_128X128_FP32.name!r}"
        raise FormatError(msg) from None


_ELEMENTS = {E4M3FN.name: E4M3FN}
