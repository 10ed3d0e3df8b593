"""Layouts in memory: every one has an inverse, and padding is never read."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockscale
from blockscale import reference
from blockscale.errors import FormatError
from blockscale.formats import (
    E4M3FN,
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    K_MAJOR_PADDED_TRANSPOSED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    MXFP8,
    NAMED_FORMATS,
    SCALE_LAYOUTS,
    SWIZZLED_32_4_4,
    BlockFormat,
    BlockShape,
    ScaleFormat,
    ScaleLayout,
)
from blockscale.formats.layout import Packing, Rows
from blockscale.reference import dequantize, quantize, refine, relayout, scale_values
from blockscale.tensor import BlockScaledTensor, torch_dtype

SHAPES = [(1, 1), (1, 640), (33, 129), (129, 1000), (130, 512), (576, 192)]


def pairs() -> list[tuple[BlockFormat, ScaleLayout]]:
    return [
        (fmt, layout)
        for fmt in NAMED_FORMATS
        for layout in SCALE_LAYOUTS
        if layout.packing is Packing.NONE or fmt.scale is ScaleFormat.UE8M0
    ]


def tensor_of(mn: int, k: int, fmt: BlockFormat) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(mn * 7 + k)
    exponents = torch.randint(-8, 8, (mn, k), generator=generator)
    return quantize(torch.randn(mn, k, generator=generator) * 2.0**exponents, fmt)


@pytest.mark.parametrize(("fmt", "layout"), pairs(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back_is_exact(
    fmt: BlockFormat, layout: ScaleLayout, shape: tuple[int, int]
) -> None:
    original = tensor_of(*shape, fmt)
    moved = relayout(original, layout)
    stored = layout.stored(*shape, fmt)
    assert tuple(moved.scales.shape) == stored.shape
    assert moved.scales.stride() == stored.strides
    assert moved.scales.dtype is torch_dtype(stored.dtype)
    assert torch.equal(scale_values(moved), scale_values(original))
    back = relayout(moved, K_MAJOR)
    assert torch.equal(back.scales.view(torch.uint8), original.scales.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(mn=st.integers(1, 300), k=st.integers(1, 900), pair=st.sampled_from(pairs()))
def test_there_and_back_on_any_shape(
    mn: int, k: int, pair: tuple[BlockFormat, ScaleLayout]
) -> None:
    fmt, layout = pair
    original = tensor_of(mn, k, fmt)
    assert torch.equal(dequantize(relayout(original, layout)), dequantize(original))


@pytest.mark.parametrize(("fmt", "layout"), pairs(), ids=str)
def test_padding_is_never_read(fmt: BlockFormat, layout: ScaleLayout) -> None:
    """Every byte that no scale lies on is set to 0xFF."""
    mn, k = 130, 700
    moved = relayout(tensor_of(mn, k, fmt), layout)
    values = scale_values(moved)
    stored = layout.stored(mn, k, fmt)
    flat = moved.scales.as_strided((stored.elements,), (1,))
    raw = flat.view(torch.uint8)
    # Where a real scale lies, storing an all-ones grid leaves something other than zero.
    ones = BlockScaledTensor(
        moved.data,
        torch.ones(fmt.block.grid(mn, k)).to(torch.float32)
        if fmt.scale is ScaleFormat.FP32
        else torch.full(fmt.block.grid(mn, k), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        fmt,
        K_MAJOR,
    )
    used = relayout(ones, layout).scales.as_strided((stored.elements,), (1,)).view(torch.uint8)
    if stored.dtype.bytes == 4 and fmt.scale is ScaleFormat.FP32:
        used = (used.view(torch.float32) != 0).repeat_interleave(4)
    raw[used == 0] = 0xFF
    assert torch.equal(scale_values(moved), values)


@pytest.mark.parametrize(("fmt", "layout"), pairs(), ids=str)
def test_meta_tensors_have_the_same_memory(fmt: BlockFormat, layout: ScaleLayout) -> None:
    meta = relayout(quantize(torch.empty(130, 700, device="meta"), fmt), layout)
    stored = layout.stored(130, 700, fmt)
    assert tuple(meta.scales.shape) == stored.shape
    assert meta.scales.stride() == stored.strides


def test_deep_gemm_packing_by_hand() -> None:
    """Two rows, five blocks along K: exponents 127..131 and 137..141, four to a word, low first.

    Word 0 of row 0 is 0x82_81_80_7F; word 1 holds exponent 131 and three zero bytes. Rows are
    contiguous, the stride along K is 4 because TMA wants 16 bytes.
    """
    data = torch.zeros(2, 640).to(torch.float8_e4m3fn)
    exponents = torch.tensor(
        [[127, 128, 129, 130, 131], [137, 138, 139, 140, 141]], dtype=torch.uint8
    )
    tensor = BlockScaledTensor(data, exponents.view(torch.float8_e8m0fnu), FP8_1X128_UE8M0, K_MAJOR)
    packed = relayout(tensor, MN_MAJOR_TMA_ALIGNED_PACKED)
    memory = packed.scales.as_strided((8,), (1,)).view(torch.uint8).tolist()
    row0, row1 = [0x7F, 0x80, 0x81, 0x82], [0x89, 0x8A, 0x8B, 0x8C]
    empty = [0, 0, 0, 0]
    assert memory == [*row0, *row1, *empty, *empty, 0x83, 0, 0, 0, 0x8D, 0, 0, 0, *empty, *empty]


def test_weights_repeat_their_exponent_for_each_row() -> None:
    data = torch.zeros(130, 128).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120], [121]], dtype=torch.uint8)
    tensor = BlockScaledTensor(
        data, exponents.view(torch.float8_e8m0fnu), FP8_128X128_UE8M0, K_MAJOR
    )
    packed = relayout(tensor, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW)
    assert packed.scales[:, 0].tolist() == [120] * 128 + [121] * 2


def test_torch_l4_padding_by_hand() -> None:
    """Two by five blocks: torch reads (8, 2) with stride 1 along K, three of eight rows padding."""
    scales = torch.arange(10.0).reshape(2, 5) + 1
    data = torch.zeros(256, 640).to(torch.float8_e4m3fn)
    moved = relayout(
        BlockScaledTensor(data, scales, FP8_128X128_FP32, K_MAJOR), K_MAJOR_PADDED_TRANSPOSED
    )
    memory = moved.scales.as_strided((16,), (1,)).tolist()
    assert memory == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9, 10, 0, 0, 0]


def test_swizzle_by_hand() -> None:
    """cuBLAS: inside a 128x4 tile, row r and column c lie at (r % 32) * 16 + (r // 32) * 4 + c."""
    rows, columns = 256, 8
    grid = (torch.arange(rows * columns) % 251).to(torch.uint8).reshape(rows, columns)
    data = torch.zeros(rows, columns * 32).to(torch.float8_e4m3fn)
    moved = relayout(
        BlockScaledTensor(data, grid.view(torch.float8_e8m0fnu), MXFP8, K_MAJOR), SWIZZLED_32_4_4
    )
    flat = moved.scales.view(torch.uint8)
    for row in range(0, rows, 5):
        for column in range(columns):
            tile = (row // 128) * (columns // 4) + column // 4
            inside = (row % 128 % 32) * 16 + (row % 128 // 32) * 4 + column % 4
            assert flat[tile * 512 + inside] == grid[row, column]


def test_scales_that_are_no_powers_of_two_cannot_be_packed() -> None:
    """SGLang #13067: un-rounded scales packed run into their neighbour's byte."""
    tensor = tensor_of(128, 512, FP8_1X128_FP32)
    with pytest.raises(FormatError, match="not powers of two"):
        relayout(tensor, MN_MAJOR_TMA_ALIGNED_PACKED, ScaleFormat.UE8M0)


def test_powers_of_two_are_packed_without_touching_the_codes() -> None:
    exact = quantize(torch.randn(128, 512), FP8_1X128_UE8M0)
    as_float = relayout(exact, K_MAJOR, ScaleFormat.FP32)
    packed = relayout(as_float, MN_MAJOR_TMA_ALIGNED_PACKED, ScaleFormat.UE8M0)
    assert packed.data.data_ptr() == exact.data.data_ptr()
    assert torch.equal(dequantize(packed), dequantize(exact))


def test_rows_that_contradict_their_block_are_refused() -> None:
    tensor = quantize(torch.randn(130, 128), FP8_128X128_UE8M0)
    packed = relayout(tensor, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW)
    packed.scales[5, 0] += 1
    with pytest.raises(FormatError, match="different scales"):
        scale_values(packed)


@pytest.mark.parametrize("block", [(64, 64), (1, 128), (128, 32), (32, 32)], ids=str)
def test_refining_blocks_changes_no_value(block: tuple[int, int]) -> None:
    original = tensor_of(300, 500, FP8_128X128_FP32)
    refined = refine(original, BlockShape(*block))
    assert refined.format.block == BlockShape(*block)
    assert torch.equal(dequantize(refined), dequantize(original))


def test_refining_to_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(FormatError):
        refine(tensor_of(128, 128, FP8_128X128_FP32), BlockShape(48, 128))


def test_no_public_function_takes_scales_alone() -> None:
    """Rounding a scale and keeping its codes must not be expressible (34 % error)."""
    for module in (reference, blockscale):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                parameters = set(inspect.signature(value).parameters)
                assert not parameters & {"scales", "sf", "weight_scale"}, name


def test_layout_enum_members_are_all_used() -> None:
    assert {layout.rows for layout in SCALE_LAYOUTS} == set(Rows)
    assert {layout.packing for layout in SCALE_LAYOUTS} == set(Packing)
    assert E4M3FN.max == 448.0
