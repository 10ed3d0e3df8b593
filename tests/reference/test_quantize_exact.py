"""Exact claims about quantize and dequantize: codes and scales, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale.errors import FormatError
from blockscale.formats import (
    AMAX_FLOOR,
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    NAMED_FORMATS,
    BlockFormat,
    ScaleFormat,
    ue8m0_byte_rounded_up,
)
from blockscale.reference import dequantize, quantize, scale_values
from blockscale.reference.quantize import round_up_to_ue8m0

SHAPES = [(1, 1), (1, 128), (31, 127), (33, 129), (128, 128), (129, 256), (192, 576), (576, 192)]


def codes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def independent(values: np.ndarray, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """The rule again, block by block, in numpy and ml_dtypes: codes and float32 scales."""
    rows, columns = fmt.block.grid(*values.shape)
    data = np.zeros(values.shape, np.uint8)
    scales = np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            where = np.s_[
                i * fmt.block.mn : (i + 1) * fmt.block.mn, j * fmt.block.k : (j + 1) * fmt.block.k
            ]
            block = values[where].astype(np.float32)
            amax = max(np.abs(block).max(), np.float32(AMAX_FLOOR))
            scale = np.float32(amax) / np.float32(448)
            if fmt.scale is ScaleFormat.UE8M0:
                scale = np.float32(2.0 ** (ue8m0_byte_rounded_up(float(scale)) - 127))
            scaled = np.clip(block / scale, np.float32(-448), np.float32(448))
            data[where] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            scales[i, j] = scale
    return data, scales


@pytest.mark.parametrize("fmt", NAMED_FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_an_independent_implementation(
    fmt: BlockFormat, shape: tuple[int, int]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 5
    tensor = quantize(values, fmt)
    data, scales = independent(values.numpy(), fmt)
    np.testing.assert_array_equal(codes(tensor.data), data)
    np.testing.assert_array_equal(scale_values(tensor).numpy(), scales)


@settings(max_examples=30, deadline=None)
@given(
    mn=st.integers(1, 140),
    k=st.integers(1, 300),
    fmt=st.sampled_from(NAMED_FORMATS),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_agrees_on_any_shape_and_magnitude(
    mn: int, k: int, fmt: BlockFormat, exponent: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(mn * 1000 + k)
    values = (torch.randn((mn, k), generator=generator) * 2.0**exponent).to(dtype)
    values = values.nan_to_num(posinf=60000.0, neginf=-60000.0)
    data, scales = independent(values.float().numpy(), fmt)
    tensor = quantize(values, fmt)
    np.testing.assert_array_equal(codes(tensor.data), data)
    np.testing.assert_array_equal(scale_values(tensor).numpy(), scales)


def test_every_e4m3_code_has_the_value_that_ml_dtypes_gives_it() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    ours = every.view(torch.float8_e4m3fn).float().numpy()
    theirs = every.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("exponent", range(-126, 127))
def test_tensor_rounding_agrees_with_the_scalar_rule(exponent: int) -> None:
    middle = (exponent + 127) << 23
    bits = torch.tensor([middle - 1, middle, middle + 1], dtype=torch.int32)
    values = bits.view(torch.float32)
    expected = [ue8m0_byte_rounded_up(value) for value in values.tolist()]
    assert round_up_to_ue8m0(values).tolist() == expected


def test_torch_cast_to_e8m0_is_not_our_rounding() -> None:
    """The trap: nearest, which would let the largest element overflow."""
    value = torch.tensor([1.25])
    assert value.to(torch.float8_e8m0fnu).float().item() == 1.0
    assert round_up_to_ue8m0(value).tolist() == [128]


@pytest.mark.parametrize("fmt", NAMED_FORMATS, ids=str)
def test_zeros_stay_zeros(fmt: BlockFormat) -> None:
    tensor = quantize(torch.zeros(130, 130), fmt)
    assert not codes(tensor.data).any()
    assert torch.equal(dequantize(tensor), torch.zeros(130, 130))


def test_the_largest_element_of_a_block_becomes_448() -> None:
    values = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    tensor = quantize(values, FP8_128X128_FP32)
    assert tensor.data.float().abs().max().item() == 448.0


@pytest.mark.parametrize("fmt", [FP8_128X128_UE8M0, MXFP8, FP8_1X128_UE8M0], ids=str)
def test_ue8m0_never_clips(fmt: BlockFormat) -> None:
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) * 1000
    ratio = values / dequantize(quantize(values, fmt)).where(values != 0, torch.ones(()))
    big = values.abs() > 1
    assert ((ratio[big] - 1).abs() <= 1 / 16 + 1e-6).all()


def test_magnitudes_below_the_floor_quantize_under_the_floor_scale() -> None:
    tensor = quantize(torch.full((1, 128), 1e-12), FP8_1X128_FP32)
    floor = torch.tensor(AMAX_FLOOR, dtype=torch.float32) / 448
    assert torch.equal(scale_values(tensor), floor.reshape(1, 1))


def test_the_largest_float32_is_finite_after_the_round_trip() -> None:
    values = torch.full((1, 128), torch.finfo(torch.float32).max)
    assert torch.isfinite(dequantize(quantize(values, FP8_1X128_FP32))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_32X32_UE8M0], ids=str)
def test_nan_and_infinity_are_seen_not_hidden(bad: float, fmt: BlockFormat) -> None:
    values = torch.ones(64, 64)
    values[3, 3] = bad
    assert not torch.isfinite(dequantize(quantize(values, fmt))).all()


def test_strides_do_not_matter() -> None:
    values = torch.randn(256, 192, generator=torch.Generator().manual_seed(4))
    plain, turned = quantize(values, MXFP8), quantize(values.T.contiguous().T, MXFP8)
    assert torch.equal(plain.data.view(torch.uint8), turned.data.view(torch.uint8))
    assert torch.equal(scale_values(plain), scale_values(turned))


def test_leading_axes_are_independent_matrices() -> None:
    values = torch.randn(3, 130, 200, generator=torch.Generator().manual_seed(5))
    stacked = quantize(values, FP8_128X128_FP32)
    for index in range(3):
        single = quantize(values[index], FP8_128X128_FP32)
        assert torch.equal(stacked.data[index].view(torch.uint8), single.data.view(torch.uint8))
        assert torch.equal(scale_values(stacked)[index], scale_values(single))


def test_integers_are_refused() -> None:
    with pytest.raises(FormatError, match="floating-point"):
        quantize(torch.ones(2, 2, dtype=torch.int32), MXFP8)


def test_a_vector_is_refused_in_words() -> None:
    with pytest.raises(FormatError, match=r"shape \(128,\); at least two axes"):
        quantize(torch.ones(128), FP8_128X128_FP32)


def test_a_parameter_leaves_no_graph_behind() -> None:
    master = torch.nn.Parameter(torch.randn(128, 128))
    tensor = quantize(master, FP8_128X128_FP32)
    assert not tensor.data.requires_grad
    assert not tensor.scales.requires_grad
    assert np.array_equal(
        codes(tensor.data), codes(quantize(master.detach(), FP8_128X128_FP32).data)
    )


def test_bf16_scales_are_never_produced() -> None:
    with pytest.raises(FormatError, match="never produced"):
        quantize(torch.ones(2, 2), FP8_128X128_FP32.with_scale(ScaleFormat.BF16))
