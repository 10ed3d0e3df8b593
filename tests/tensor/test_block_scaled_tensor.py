"""The container checks what it is given, names both facts, and never reads values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blockscale.errors import FormatError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    DType,
)
from blockscale.reference import dequantize, quantize, relayout
from blockscale.tensor import BlockScaledTensor, dtype_of, torch_dtype


def codes(mn: int = 256, k: int = 384) -> torch.Tensor:
    return torch.zeros(mn, k).to(torch.float8_e4m3fn)


def scales(mn: int = 256, k: int = 384) -> torch.Tensor:
    return torch.ones(FP8_128X128_FP32.block.grid(mn, k))


def test_a_consistent_tensor_is_accepted() -> None:
    tensor = BlockScaledTensor(codes(), scales(), FP8_128X128_FP32, K_MAJOR)
    assert (tensor.mn, tensor.k, tensor.leading) == (256, 384, ())
    assert tensor.nbytes == 256 * 384 + 2 * 3 * 4


@pytest.mark.parametrize(
    ("data", "scale", "words"),
    [
        (torch.zeros(256, 384), scales(), ("float32", "float8_e4m3fn")),
        (codes()[0], scales(), ("two axes",)),
        (codes().T, scales(), ("strides", "adjacent")),
        (codes(), scales().double(), ("float32", "float64")),
        (codes(), scales().T, ("(2, 3)", "(3, 2)")),
        (codes(), scales(128, 384), ("(2, 3)", "(1, 3)")),
        (codes(), scales().T.contiguous().T, ("strides",)),
        (codes(), scales().to("meta"), ("meta", "cpu")),
    ],
    ids=["dtype", "axes", "data strides", "scale dtype", "transposed", "rows", "strides", "device"],
)
def test_contradictions_are_refused_with_both_facts(
    data: torch.Tensor, scale: torch.Tensor, words: tuple[str, ...]
) -> None:
    with pytest.raises(FormatError) as caught:
        BlockScaledTensor(data, scale, FP8_128X128_FP32, K_MAJOR)
    for word in words:
        assert word in str(caught.value)


def test_float32_scales_are_no_ue8m0_scales_and_the_reverse() -> None:
    """Handing one format to a reader of the other cannot be expressed."""
    with pytest.raises(FormatError, match="float8_e8m0fnu"):
        BlockScaledTensor(codes(), scales(), FP8_128X128_UE8M0, K_MAJOR)
    exponents = torch.full((2, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(FormatError, match="float32"):
        BlockScaledTensor(codes(), exponents, FP8_128X128_FP32, K_MAJOR)


def test_missing_padding_is_found() -> None:
    """TMA reads 36 rows of scales where 33 are shown: the storage must hold them."""
    short = torch.ones(3 * 33).as_strided((33, 3), (1, 33))
    with pytest.raises(FormatError, match="strides"):
        BlockScaledTensor(codes(33, 384), short, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
    cut = torch.ones(36 * 2 + 33).as_strided((33, 3), (1, 36))
    with pytest.raises(FormatError, match="bytes with padding"):
        BlockScaledTensor(codes(33, 384), cut, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)


def test_it_is_frozen() -> None:
    tensor = BlockScaledTensor(codes(), scales(), FP8_128X128_FP32, K_MAJOR)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.scales = scales()  # type: ignore[misc]  # the point


def test_torch_does_not_take_it() -> None:
    tensor = BlockScaledTensor(codes(), scales(), FP8_128X128_FP32, K_MAJOR)
    with pytest.raises(TypeError):
        torch.add(tensor, tensor)  # type: ignore[arg-type]  # the point


def test_repr_shows_no_values() -> None:
    tensor = BlockScaledTensor(codes(), scales(), FP8_128X128_FP32, K_MAJOR)
    assert repr(tensor) == "BlockScaledTensor(256x384, e4m3fn/128x128/fp32, k_major, cpu)"


def test_to_keeps_strides_and_padding() -> None:
    tensor = relayout(quantize(torch.randn(33, 700), FP8_1X128_UE8M0), MN_MAJOR_TMA_ALIGNED_PACKED)
    moved = tensor.to("cpu")
    assert moved.scales.stride() == tensor.scales.stride()
    assert torch.equal(dequantize(moved), dequantize(tensor))
    assert tensor.to("meta").scales.stride() == tensor.scales.stride()


@pytest.mark.parametrize("dtype", list(DType))
def test_dtypes_lead_back(dtype: DType) -> None:
    assert dtype_of(torch_dtype(dtype)) is dtype


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(FormatError, match="int8"):
        dtype_of(torch.int8)
