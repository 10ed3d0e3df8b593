"""Layouts as values: the memory that each one asks for, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from blockscale.errors import FormatError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_BY_MN,
    K_MAJOR,
    K_MAJOR_PADDED_TRANSPOSED,
    K_MAJOR_TRANSPOSED,
    MN_MAJOR,
    MN_MAJOR_PADDED,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    MXFP8,
    NAMED_FORMATS,
    SCALE_LAYOUTS,
    SWIZZLED_32_4_4,
    BlockFormat,
    BlockShape,
    ScaleLayout,
    block_format_named,
    scale_layout_named,
)

# (layout, format, mn, k) -> (shape, strides, elements). Worked out by hand.
BY_HAND = [
    (K_MAJOR, FP8_128X128_FP32, 576, 1536, (5, 12), (12, 1), 60),
    (MN_MAJOR, FP8_1X128_FP32, 33, 300, (33, 3), (1, 33), 99),
    (MN_MAJOR_TMA_ALIGNED, FP8_1X128_FP32, 33, 300, (33, 3), (1, 36), 108),
    (MN_MAJOR_PADDED, FP8_1X128_FP32, 33, 300, (36, 3), (1, 36), 108),
    (MN_MAJOR_TMA_ALIGNED_PACKED, FP8_1X128_UE8M0, 33, 7168, (33, 14), (1, 36), 504),
    (MN_MAJOR_TMA_ALIGNED_PACKED, FP8_1X128_UE8M0, 1, 640, (1, 2), (1, 4), 8),
    (MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW, FP8_128X128_UE8M0, 130, 640, (130, 2), (1, 132), 264),
    (K_BY_MN, FP8_128X128_FP32, 256, 384, (3, 2), (2, 1), 6),
    (K_MAJOR_TRANSPOSED, FP8_128X128_FP32, 256, 384, (3, 2), (1, 3), 6),
    (K_MAJOR_PADDED_TRANSPOSED, FP8_128X128_FP32, 256, 640, (8, 2), (1, 8), 16),
    (SWIZZLED_32_4_4, MXFP8, 129, 160, (2048,), (1,), 2048),
]


@pytest.mark.parametrize(
    ("layout", "fmt", "mn", "k", "shape", "strides", "elements"),
    BY_HAND,
    ids=lambda value: str(value) if isinstance(value, ScaleLayout) else None,
)
def test_stored_memory_by_hand(
    layout: ScaleLayout,
    fmt: BlockFormat,
    mn: int,
    k: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    elements: int,
) -> None:
    stored = layout.stored(mn, k, fmt)
    assert (stored.shape, stored.strides, stored.elements) == (shape, strides, elements)


def test_every_layout_is_worked_out_by_hand() -> None:
    assert {case[0] for case in BY_HAND} == set(SCALE_LAYOUTS)


@pytest.mark.parametrize(
    "layout",
    [MN_MAJOR_TMA_ALIGNED_PACKED, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW, SWIZZLED_32_4_4],
    ids=str,
)
def test_layouts_of_exponents_refuse_float32_scales(layout: ScaleLayout) -> None:
    with pytest.raises(FormatError, match="cannot be stored"):
        layout.stored(128, 128, FP8_128X128_FP32)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS, ids=str)
def test_names_lead_back(layout: ScaleLayout) -> None:
    assert scale_layout_named(layout.name) is layout


@pytest.mark.parametrize("fmt", NAMED_FORMATS, ids=str)
def test_format_names_lead_back(fmt: BlockFormat) -> None:
    assert block_format_named(fmt.name) == fmt


@pytest.mark.parametrize(
    "name", ["", "e4m3fn", "e4m3fn/128x128", "e5m2/128x128/fp32", "e4m3fn/0x128/fp32", "a/b/c"]
)
def test_malformed_format_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="no block"):
        block_format_named(name)


def test_unknown_layout_error_lists_the_known_ones() -> None:
    with pytest.raises(FormatError, match="mn_major_tma_aligned_packed"):
        scale_layout_named("column_major")


def test_ragged_grids_count_partial_blocks() -> None:
    assert BlockShape(128, 128).grid(576, 1) == (5, 1)
    assert BlockShape(1, 32).grid(3, 33) == (3, 2)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 4)])
def test_empty_blocks_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="at least one"):
        BlockShape(*sizes)
