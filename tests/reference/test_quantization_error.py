"""Quantization error against the float tensor: what the formats cost on normal weights."""

from __future__ import annotations

import math

import pytest
import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    NAMED_FORMATS,
    BlockFormat,
)
from blockscale.reference import dequantize, quantize, requantize

# Signal to noise in dB: E4M3 has 3 mantissa bits, so about 31.5 dB whatever the block.
SNR_DB = (31.0, 32.5)


def normal_weights() -> torch.Tensor:
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(11))


def snr_db(values: torch.Tensor, restored: torch.Tensor) -> float:
    noise = (restored.double() - values.double()).square().sum()
    return 10 * math.log10(float(values.double().square().sum() / noise))


@pytest.mark.parametrize("fmt", NAMED_FORMATS, ids=str)
def test_signal_to_noise_of_normal_weights(fmt: BlockFormat) -> None:
    values = normal_weights()
    assert SNR_DB[0] < snr_db(values, dequantize(quantize(values, fmt))) < SNR_DB[1]


@pytest.mark.parametrize("fmt", NAMED_FORMATS, ids=str)
def test_error_has_no_bias(fmt: BlockFormat) -> None:
    values = normal_weights()
    error = (dequantize(quantize(values, fmt)) - values).double()
    assert abs(error.mean()) < 10 * error.std() / math.sqrt(error.numel())


@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_1X128_FP32], ids=str)
def test_no_value_moves_by_more_than_half_a_step(fmt: BlockFormat) -> None:
    """Half a step is 1/16 of a normal value, or half the smallest subnormal times the scale."""
    values = normal_weights()
    quantized = quantize(values, fmt)
    scale = values.abs().max() / 448
    allowed = torch.maximum(values.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)
    assert ((dequantize(quantized) - values).abs() <= allowed).all()


def test_rounding_once_from_floats_beats_requantizing() -> None:
    values = normal_weights()
    once = dequantize(quantize(values, FP8_128X128_UE8M0))
    twice = dequantize(requantize(quantize(values, FP8_128X128_FP32), FP8_128X128_UE8M0).tensor)
    assert snr_db(values, once) > snr_db(values, twice) + 2


@pytest.mark.parametrize("target", [FP8_128X128_UE8M0, FP8_32X32_UE8M0, MXFP8], ids=str)
def test_requantizing_normal_weights_costs_two_to_three_percent(target: BlockFormat) -> None:
    cost = requantize(quantize(normal_weights(), FP8_128X128_FP32), target)
    assert 0.02 < cost.relative_error < 0.03
    assert not cost.is_lossless


@pytest.mark.parametrize("target", [FP8_128X128_UE8M0, FP8_128X128_FP32], ids=str)
def test_a_second_requantization_changes_no_value(target: BlockFormat) -> None:
    first = requantize(quantize(normal_weights(), FP8_128X128_FP32), target).tensor
    second = requantize(first, target)
    assert second.is_lossless
    assert torch.equal(dequantize(first), dequantize(second.tensor))


def test_requantizing_powers_of_two_is_lossless() -> None:
    ue8m0 = quantize(normal_weights(), FP8_128X128_UE8M0)
    assert requantize(ue8m0, FP8_128X128_FP32).relative_error < 0.03
    assert requantize(ue8m0, FP8_128X128_UE8M0).is_lossless


def test_requantizing_zeros_costs_nothing() -> None:
    cost = requantize(quantize(torch.zeros(128, 128), FP8_128X128_FP32), FP8_128X128_UE8M0)
    assert cost.relative_error == 0.0
    assert cost.is_lossless
